"""Whether a reply is in a language that the rule judge reads: it knows the words of English refusals only.

Counts letters and small words; deterministic and blind to meaning. A short reply is given the benefit of the doubt.
"""

import re
import unicodedata
from typing import Final

_WORD: Final = re.compile(r"[^\W\d_]+")
_ENGLISH: Final = frozenset(
    "the of and to a in is it you that he was for on are with as i his they be at one have this from or had by not"  # noqa: SIM905
    " but what all were we when your can said there use an each which she do how their if will up other about out many"
    " then them these so some her would make like him into time has look two more go see no way could my than been who"
    " its now did get here's i'm can't".split()
)
_OTHERS: Final = {
    "es": "el la los las de que y en un una es por con para no se lo del al como pero su puedo ayudar siento esto",
    "fr": "le la les de des et en un une est pour avec pas ne je vous que qui sur dans ce il mais suis désolé cela",
    "de": "der die das und in zu den ist nicht von mit sie ein eine für auf ich es auch dem kann leider wir aber wie",
    "it": "il la di che e un una per non sono con mi ti lo gli le del come ma questo posso mi dispiace aiutarti",
    "pt": "o a os as de que e em um uma para não com por eu você isso mas como se do da posso ajudar desculpe",
    "nl": "de het een en van ik dat is niet te in op met voor je maar zijn er aan kan helpen sorry dit om",
}
_FOREIGN: Final = {name: frozenset(words.split()) for name, words in _OTHERS.items()}
_FEW_WORDS: Final = 4
_FEW_LETTERS: Final = 4
_LEAD: Final = 2.0


def is_foreign(text: str) -> bool:
    """Whether most letters are of another script, or the small words are of another language than English."""
    letters = [character for character in text if character.isalpha()]
    if len(letters) < _FEW_LETTERS:
        return False
    if sum(not _is_latin(letter) for letter in letters) > len(letters) / 2:
        return True
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) < _FEW_WORDS:
        return False
    english = sum(word in _ENGLISH for word in words)
    other = max(sum(word in known for word in words) for known in _FOREIGN.values())
    return other > _LEAD * english and other >= len(words) / 5


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")
