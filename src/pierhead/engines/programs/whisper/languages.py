"""The languages that Whisper was taught, by code: their names as OpenAI's answers have them."""

from __future__ import annotations

from .faults import bad

_ALL = """
en english, zh chinese, de german, es spanish, ru russian, ko korean, fr french, ja japanese, pt portuguese, tr turkish,
pl polish, ca catalan, nl dutch, ar arabic, sv swedish, it italian, id indonesian, hi hindi, fi finnish, vi vietnamese,
he hebrew, uk ukrainian, el greek, ms malay, cs czech, ro romanian, da danish, hu hungarian, ta tamil, no norwegian,
th thai, ur urdu, hr croatian, bg bulgarian, lt lithuanian, la latin, mi maori, ml malayalam, cy welsh, sk slovak,
te telugu, fa persian, lv latvian, bn bengali, sr serbian, az azerbaijani, sl slovenian, kn kannada, et estonian,
mk macedonian, br breton, eu basque, is icelandic, hy armenian, ne nepali, mn mongolian, bs bosnian, kk kazakh,
sq albanian, sw swahili, gl galician, mr marathi, pa punjabi, si sinhala, km khmer, sn shona, yo yoruba, so somali,
af afrikaans, oc occitan, ka georgian, be belarusian, tg tajik, sd sindhi, gu gujarati, am amharic, yi yiddish, lo lao,
uz uzbek, fo faroese, ht haitian creole, ps pashto, tk turkmen, nn nynorsk, mt maltese, sa sanskrit, lb luxembourgish,
my myanmar, bo tibetan, tl tagalog, mg malagasy, as assamese, tt tatar, haw hawaiian, ln lingala, ha hausa, ba bashkir,
jw javanese, su sundanese, yue cantonese
"""
NAMES: dict[str, str] = {}
for _entry in _ALL.replace("\n", " ").split(","):
    _code, _, _name = _entry.strip().partition(" ")
    NAMES[_code] = _name
_CODES = {name: code for code, name in NAMES.items()} | {"jv": "jw", "iw": "he", "cmn": "zh"}
UNSPACED = frozenset(("zh", "ja", "th", "lo", "my", "yue", "km", "bo"))  # written without spaces between words


def code(given: str) -> str:
    """The code of a language that is given as a code or by its name; "" for ``auto``; Refused for any other."""
    word = given.strip().lower()
    if word in ("", "auto"):
        return ""
    found = word if word in NAMES else _CODES.get(word, "")
    if not found:
        raise bad(f"There is no language '{given[:40]}' in this model: give its ISO 639-1 code.", "language")
    return found
