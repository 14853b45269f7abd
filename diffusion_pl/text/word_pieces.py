"""Word pieces of uncased BERT models: Devlin et al. 2018, arXiv 1810.04805; Wu et al. 2016.

Characters are cleaned, accents stripped, letters lowered; words end at white space, and punctuation
and Chinese characters are words of their own; a word is cut greedily into the longest known pieces.
Special tokens written in a caption, such as "[SEP]", are plain text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from diffusion_pl.errors import UserError

CLS, SEP, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
MOST_CHARACTERS = 100  # of a word; a longer one is unknown

_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPieces:
    """A tokenizer.

    Args:
        vocabulary: the id of each piece; those within a word begin with "##".

    Raises:
        UserError: a special token is missing.
    """

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self.vocabulary = vocabulary
        for token in (CLS, SEP, UNKNOWN):
            if token not in vocabulary:
                raise UserError(f"the vocabulary has no {token}")

    def __call__(self, caption: str, length: int | None = None) -> list[int]:
        """The ids of [CLS], the pieces and [SEP].

        Args:
            caption: any text.
            length: of the result, at least 2, by leaving out the last pieces; None: whole.
        """
        pieces = [piece for word in _words(caption) for piece in self._pieces(word)]
        if length is not None:
            pieces = pieces[: length - 2]
        return [self.vocabulary[piece] for piece in (CLS, *pieces, SEP)]

    def _pieces(self, word: str) -> list[str]:
        if len(word) > MOST_CHARACTERS:
            return [UNKNOWN]
        found: list[str] = []
        start = 0
        while start < len(word):
            ends = range(len(word), start, -1)
            prefix = "##" if start else ""
            end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
            if end is None:
                return [UNKNOWN]
            found.append(prefix + word[start:end])
            start = end
        return found


def _words(caption: str) -> list[str]:
    """The words of a caption, cleaned; each letter is lowered alone, as by fast tokenizers."""
    kept = "".join(char for char in caption if not _is_dropped(char))
    marked = []
    for char in unicodedata.normalize("NFD", kept):
        if unicodedata.category(char) == "Mn":
            continue
        marked.append(f" {char} " if _is_separate(char) else char.lower())
    return "".join(marked).split()


def _is_dropped(char: str) -> bool:
    """Control, format and private characters, and what stands for one that was not decoded."""
    dropped = unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs")
    return char == "\ufffd" or (dropped and char not in "\t\n\r")


def _is_separate(char: str) -> bool:
    """Punctuation, all of ASCII's symbols among it, and Chinese characters."""
    if "!" <= char <= "~":
        return not char.isalnum()
    code = ord(char)
    chinese = any(first <= code <= last for first, last in _CHINESE)
    return chinese or unicodedata.category(char)[0] == "P"
