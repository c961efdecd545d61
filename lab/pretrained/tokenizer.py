"""The tokenizer of a pretrained model: byte-level BPE (Radford et al. 2019, GPT-2)."""
import functools
import math
import re

from sleep import BadInput

# White space as Unicode has it; Python's \s has four control characters more.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^{SPACE}\w]|_)+"
                   rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def letters_of_bytes():
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = letters_of_bytes()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """Text <-> tokens. The split of SmolLM2 and Ouro: every digit alone, then the pattern of GPT-2.

    ASCII text gets exactly their tokens. Elsewhere Python's letters and digits differ a little from
    Unicode's, which the pattern means. A byte that has no token is dropped, as they do: SmolLM2
    lacks 21, some control characters among them.
    """

    def __init__(self, tokens, merges, special):
        """tokens: {text: number}; merges: pairs of texts, the first come first; special: texts."""
        self.numbers = tokens
        self.texts = {number: text for text, number in tokens.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special = set(special)
        longest_first = sorted(special, key=len, reverse=True)
        self.split_special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.encode_piece = functools.lru_cache(100_000)(self.merge)

    def encode(self, text):
        """Text -> list of token numbers. Special tokens may stand in it, as <|im_start|>."""
        numbers = []
        for part in self.split_special.split(text) if self.special else [text]:
            if part in self.special:
                numbers.append(self.numbers[part])
                continue
            for piece in re.split(r"(\d)", part):
                for word in PIECE.findall(piece):
                    numbers += self.encode_piece(word)
        return numbers

    def merge(self, word):
        """A word -> its tokens: of all neighbours that may merge, the pair of least rank does."""
        parts = [LETTERS[byte] for byte in word.encode("utf-8", errors="surrogatepass")]
        parts = [part for part in parts if part in self.numbers]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(self.numbers[part] for part in parts)

    def decode(self, numbers):
        """Token numbers -> text. Bytes that are no UTF-8 become U+FFFD."""
        raw = bytearray()
        for number in numbers:
            text = self.texts.get(int(number), "")
            if text in self.special:
                raw += text.encode()
            else:
                raw += bytes(BYTES[letter] for letter in text)
        return raw.decode("utf-8", errors="replace")


def make_tokenizer(tokens, merges, special):
    """As Tokenizer, after a check that the parts fit together."""
    missing = [chr(byte) for byte in range(33, 127) if chr(byte) not in tokens]
    if missing:
        raise BadInput(f"this tokenizer has no token for {missing[0]!r}: it is no byte-level BPE, "
                       "the only one that is read here.")
    if not all(isinstance(number, int) and number >= 0 for number in tokens.values()):
        raise BadInput("this tokenizer is damaged: the number of a token is none.")
    for first, second in merges:
        if first not in tokens or second not in tokens or first + second not in tokens:
            raise BadInput(f"this tokenizer is damaged: it merges {first!r} and {second!r}, and "
                           "one of them or their sum is no token.")
    return Tokenizer(tokens, merges, special)


def of_gguf(facts):
    kind = (facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise BadInput(f"this GGUF has the tokenizer {kind[0]!r} with the split {kind[1]!r}; only "
                       "'gpt2' with 'smollm' is read here.")
    texts = facts.get("tokenizer.ggml.tokens")
    types = facts.get("tokenizer.ggml.token_type")
    merges = facts.get("tokenizer.ggml.merges")
    fits = isinstance(texts, list) and isinstance(types, list) and isinstance(merges, list)
    fits = fits and len(texts) == len(types)
    if not fits or not all(isinstance(text, str) for text in texts + merges):
        raise BadInput("the tokenizer of this GGUF is damaged: tokens, their types and merges do "
                       "not fit.")
    control = 3
    special = [text for text, kind in zip(texts, types) if kind == control]
    tokens = {text: number for number, text in enumerate(texts)}
    return make_tokenizer(tokens, split_merges(merges), special)


def of_json(facts):
    try:
        model = facts["model"]
        steps = facts["pre_tokenizer"]["pretokenizers"]
        steps = [(step["type"], step.get("individual_digits"), step.get("add_prefix_space"))
                 for step in steps]
        known = steps == [("Digits", True, None), ("ByteLevel", None, False)]
        if model["type"] != "BPE" or not known or facts.get("normalizer"):
            raise BadInput(f"tokenizer.json has the tokenizer {model['type']!r} with the split "
                           f"{steps}; only byte-level BPE with single digits is read here.")
        tokens = dict(model["vocab"])
        special = [token["content"] for token in facts.get("added_tokens", [])]
        tokens |= {token["content"]: token["id"] for token in facts.get("added_tokens", [])}
        return make_tokenizer(tokens, split_merges(model["merges"]), special)
    except BadInput:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise BadInput(f"tokenizer.json is no tokenizer that is read here: {type(e).__name__} "
                       f"{e}.") from None


def split_merges(merges):
    """'a b' or ['a', 'b'] -> ('a', 'b'), for each."""
    pairs = []
    for merge in merges:
        pairs.append(tuple(merge.split(" ") if isinstance(merge, str) else merge))
    if any(len(pair) != 2 for pair in pairs):
        raise BadInput("the tokenizer is damaged: a merge is not of two parts.")
    return pairs
