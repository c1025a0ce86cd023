"""What of a text is said aloud, in words that any English voice can say.

    sayable("**3.5 km** at 10:05, see https://lorikeet.example")    # "three point five kilometers at ten oh five, see."

Markdown, code, links, citations and emoji are left out. Numbers, dates, times, money, units and abbreviations become
words here, so that every voice reads them alike. It knows no voice and no sound.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from re import Match

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_LARGEST = 10**15
LONGEST_WORD = 100
"""What is longer is no word, and is said in pieces: the rules look at a word from each of its letters."""

_MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]  # fmt: skip
_MONTH_BY_START = {month[:3].lower(): month for month in _MONTHS}
_MONTH = r"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|" + "|".join(_MONTHS) + r")\b\.?"
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_UNITS = {
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "m/s": ("meter per second", "meters per second"),
    "mph": ("mile per hour", "miles per hour"),
    "km²": ("square kilometer", "square kilometers"),
    "m²": ("square meter", "square meters"),
    "km": ("kilometer", "kilometers"),
    "cm": ("centimeter", "centimeters"),
    "mm": ("millimeter", "millimeters"),
    "m": ("meter", "meters"),
    "ft": ("foot", "feet"),
    "mi": ("mile", "miles"),
    "kg": ("kilogram", "kilograms"),
    "mg": ("milligram", "milligrams"),
    "g": ("gram", "grams"),
    "lbs": ("pound", "pounds"),
    "lb": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ml": ("milliliter", "milliliters"),
    "mL": ("milliliter", "milliliters"),
    "L": ("liter", "liters"),
    "l": ("liter", "liters"),
    "kB": ("kilobyte", "kilobytes"),
    "KB": ("kilobyte", "kilobytes"),
    "MB": ("megabyte", "megabytes"),
    "GB": ("gigabyte", "gigabytes"),
    "TB": ("terabyte", "terabytes"),
    "Hz": ("hertz", "hertz"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
    "kWh": ("kilowatt hour", "kilowatt hours"),
    "kW": ("kilowatt", "kilowatts"),
    "W": ("watt", "watts"),
    "ms": ("millisecond", "milliseconds"),
    "s": ("second", "seconds"),
    "min": ("minute", "minutes"),
    "hrs": ("hour", "hours"),
    "hr": ("hour", "hours"),
    "h": ("hour", "hours"),
}
_ABBREVIATIONS = {
    "Dr": "Doctor",
    "Mr": "Mister",
    "Mrs": "Missus",
    "Ms": "Miz",
    "Prof": "Professor",
    "Mt": "Mount",
    "Jr": "Junior",
    "Sr": "Senior",
    "vs": "versus",
    "approx": "approximately",
    "Inc": "Incorporated",
    "Ltd": "Limited",
    "Corp": "Corporation",
    "Dept": "Department",
    "Gov": "Governor",
    "Gen": "General",
    "etc": "et cetera",
}
_DOTTED = {"e.g.": "for example", "i.e.": "that is", "a.k.a.": "also known as"}
_FRACTIONS = {"½": "one half", "¼": "one quarter", "¾": "three quarters", "⅓": "one third", "⅔": "two thirds"}

_N = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_BIG = r"(?:\s?(hundred|thousand|million|billion|trillion|bn|[kKmMbB])\b)?"
_SCALE_LETTERS = {"k": "thousand", "m": "million", "b": "billion", "bn": "billion"}
_APART = r"(?<![\w.,:/-])"


def cardinal(number: int) -> str:
    """Return a whole number in words: 1204 -> "one thousand two hundred four"."""
    if number < 0:
        return f"minus {cardinal(-number)}"
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    size, name = next(scale for scale in _SCALES if number >= scale[0])
    count, rest = divmod(number, size)
    return f"{cardinal(count)} {name}" + (f" {cardinal(rest)}" if rest else "")


def ordinal(number: int) -> str:
    """Return the ordinal in words: 21 -> "twenty-first"."""
    words = cardinal(number)
    head, last = re.fullmatch(r"(.*?)(\w+)", words).groups()  # type: ignore[union-attr]  # words are never empty
    return head + _ORDINALS.get(last, f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def year(number: int) -> str:
    """Return a year as people say it: 1905 -> "nineteen oh five", 2024 -> "twenty twenty-four"."""
    century, rest = divmod(number, 100)
    if number % 1000 < 10:
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def sayable(text: str) -> str:
    """Return what of `text` is said aloud, numbers in words, each line ended as a sentence; '' if nothing is."""
    text = _strip_markup(text)
    lines = [" ".join(_read(" ".join(line.split())).split()) for line in text.splitlines()]
    ended = [line if line[-1] in ".!?:;," else f"{line}." for line in lines if re.search(r"\w", line)]
    joined = re.sub(r"\s+([,.!?;:])", r"\1", " ".join(ended))
    return re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", re.sub(r"(?<!\.)[,;:]+\.", ".", joined)).lstrip(",;:. ")


def _strip_markup(text: str) -> str:
    """Return `text` without markdown, HTML, code blocks, addresses, citations and pictures, line by line as it was."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"```.*?(?:```|\Z)", re.DOTALL), " "),
    (re.compile(r"<(?:script|style)\b.*?(?:</\w+>|\Z)", re.DOTALL | re.IGNORECASE), " "),
    (re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>"), " "),
    (re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)"), " "),
    (re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)?"), r"\1"),
    (re.compile(r"(?:[(<\[]\s*)?(?:https?://|www\.)[^\s<>\")\]]*[^\s<>\")\].,;:!?](?:\s*[)>\]])?"), " "),
    (re.compile(r"\s?\[\^?\d+\]"), ""),
    (re.compile(r"^[ \t]*(?:[-*_=|:+][ \t]*){3,}$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*\|[ \t]*|[ \t]*\|[ \t]*$", re.MULTILINE), ""),
    (re.compile(r"[ \t]*\|[ \t]*"), ", "),
    (re.compile(r"^\s{0,3}(?:#{1,6}\s+|>\s?)+", re.MULTILINE), ""),
    (re.compile(r"^\s*[-*+•‣]\s+", re.MULTILINE), ""),
    (re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~)(?=\S)|(?<=[^\s*_~])(\*{1,3}|_{1,3}|~~)(?!\w)|\*\*|__"), ""),
    (re.compile(r"`+"), ""),
    (re.compile(r"\\[()\[\]]|\${2}"), " "),
    (re.compile(r"(?<!\w)[:;]-?[)(DPp](?!\w)"), " "),
    (
        re.compile(
            "[\U0001f000-\U0001faff\U0001f1e6-\U0001f1ff\u2190-\u21ff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff"
            "\ufe0e\ufe0f\u200b-\u200f\u20e3\u2028-\u202e\u2060-\u2069\U000e0020-\U000e007f]+"
        ),
        " ",
    ),
)


_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)")


def _read(line: str) -> str:
    """Return one line with what is not a word put into words; the order of the rules matters."""
    line = _LONG_WORD.sub(r"\g<0> ", line.replace("\u2019", "'").replace("\u00a0", " "))
    for pattern, say in _RULES:
        line = pattern.sub(say, line)
    return line


def _number(digits: str) -> str:
    """Return a number as written, such as 1,250 or 3.50 or 007, in words."""
    whole, _, decimals = digits.replace(",", "").partition(".")
    spelled = (len(whole) > 1 and whole[0] == "0") or int(whole) >= _LARGEST
    said = _digits(whole) if spelled else cardinal(int(whole))
    return f"{said} point {_digits(decimals)}" if decimals else said


def _digits(digits: str) -> str:
    return " ".join(_ONES[int(digit)] for digit in digits if digit.isdecimal())


def _bare(match: Match[str]) -> str:
    return _year_or_number(match[0])


def _year_or_number(digits: str) -> str:
    return year(int(digits)) if re.fullmatch(r"1[1-9]\d\d|20\d\d", digits) else _number(digits)


def _plural(amount: str, one: str, many: str) -> str:
    return one if amount.replace(",", "") == "1" else many


def _time(match: Match[str]) -> str:
    hour, minute, half = int(match[1]), int(match[2]), _half(match[3])
    if hour > 24 or minute > 59:
        return match[0]
    if minute == 0:
        return f"{cardinal(hour)}{half or (' o clock' if 0 < hour <= 12 else ' hundred hours')}"
    return f"{cardinal(hour)} {'oh ' if minute < 10 else ''}{cardinal(minute)}{half}"


def _half(marker: str | None) -> str:
    """Return " A M" or " P M", '' for none."""
    return f" {marker[0].upper()} M" if marker else ""


def _date(day: int, month: int, year_: str | None) -> str | None:
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    return f"{_MONTHS[month - 1]} {ordinal(day)}" + (f", {year(int(year_))}" if year_ else "")


def _iso_date(match: Match[str]) -> str:
    return _date(int(match[3]), int(match[2]), match[1]) or match[0]


def _slash_date(match: Match[str]) -> str:
    first, second = int(match[1]), int(match[2])
    month, day = (first, second) if first <= 12 else (second, first)
    return _date(day, month, match[3]) or match[0]


def _month_first(match: Match[str]) -> str:
    month = _MONTHS.index(_MONTH_BY_START[match[1][:3].lower()]) + 1
    return _date(int(match[2]), month, match[3]) or match[0]


def _day_first(match: Match[str]) -> str:
    month, day = _MONTH_BY_START[match[2][:3].lower()], int(match[1])
    if not 1 <= day <= 31:
        return match[0]
    article = "" if match.string[: match.start()].rstrip().lower().endswith("the") else "the "
    return f"{article}{ordinal(day)} of {month}" + (f", {year(int(match[3]))}" if match[3] else "")


def _money(match: Match[str]) -> str:
    one, many, cent, cents = _CURRENCIES[match[1]]
    amount, scale = match[2], match[3]
    whole, _, decimals = amount.partition(".")
    if scale:
        return f"{_number(amount)} {_SCALE_LETTERS.get(scale.lower(), scale)} {many}"
    if len(decimals) != 2:
        return f"{_number(amount)} {_plural(amount, one, many)}"
    parts = [f"{_number(whole)} {_plural(whole, one, many)}"] if whole != "0" else []
    if int(decimals):
        parts.append(f"{cardinal(int(decimals))} {cent if int(decimals) == 1 else cents}")
    return " and ".join(parts) or f"zero {many}"


def _unit(match: Match[str]) -> str:
    sign = "minus " if match[1] else ""
    return f"{sign}{_number(match[2])} {_plural(match[2], *_UNITS[match[3]])}"


def _degrees(match: Match[str]) -> str:
    scale = {"C": " Celsius", "F": " Fahrenheit", "K": " Kelvin"}.get((match[3] or "").upper(), "")
    sign = "minus " if match[1] else ""
    return f"{sign}{_number(match[2])} {_plural(match[2], 'degree', 'degrees')}{scale}"


def _fraction(match: Match[str]) -> str:
    above, below = int(match[1]), int(match[2])
    if (above, below) == (24, 7):
        return "twenty-four seven"
    if not 0 < above < below <= 10:
        return f"{cardinal(above)} over {cardinal(below)}"
    name = {2: "half", 4: "quarter"}.get(below) or ordinal(below)
    return f"{cardinal(above)} {name if above == 1 else ('halves' if below == 2 else name + 's')}"


def _decade(match: Match[str]) -> str:
    number = int(match[1])
    words = year(number) if number > 99 else cardinal(number)
    return f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"


def _abbreviation(match: Match[str]) -> str:
    ends = match.end() == len(match.string) and match[0].endswith(".")
    return _ABBREVIATIONS[match[1]] + ("." if ends else "")


def _address(match: Match[str]) -> str:
    return match[0].replace("@", " at ").replace(".", " dot ").replace("-", " dash ").replace("_", " underscore ")


Saying = str | Callable[[Match[str]], str]


def _rule(pattern: str, say: Saying) -> tuple[re.Pattern[str], Saying]:
    return re.compile(pattern), say


_HALF = r"(?:\s?([AaPp])\.?\s?[Mm]\b\.?(?=\W|$))"
_UNIT_NAMES = "|".join(re.escape(name) for name in sorted(_UNITS, key=len, reverse=True))

_RULES = (
    _rule(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", _address),
    _rule(r"\b[a-zA-Z][\w-]*(?:\.[\w-]+)*\.(?:com|org|net|io|dev|gov|edu|example)\b", _address),
    _rule(r"(?<!\w)(e\.g\.|i\.e\.|a\.k\.a\.)", lambda m: _DOTTED[m[1]]),
    _rule(r"\b(Dr|Mr|Mrs|Ms|Prof|Mt|Jr|Sr|vs|approx|Inc|Ltd|Corp|Dept|Gov|Gen|etc)\.", _abbreviation),
    _rule(r"\b(Dr|Mr|Mrs|Ms|vs)\b(?=\s\w)", _abbreviation),
    _rule(r"\bSt\.?\s(?=[A-Z])", "Saint "),
    _rule(r"\bNo\.\s?(?=\d)", "number "),
    _rule(r"\bw/(?=\s)", "with"),
    _rule(r"[~≈]\s?(?=[\d$£€¥])", "about "),
    _rule(r"#\s?(?=\d)", "number "),
    _rule(r"(?<![\w'])'?(\d{4}|\d0)s\b", _decade),
    _rule(r"\b(\d)'\s?(\d{1,2})\"", lambda m: f"{cardinal(int(m[1]))} feet {cardinal(int(m[2]))}"),
    _rule(r"(?<=[A-Za-z])(?=\d)", " "),
    _rule(rf"{_APART}(\d{{4}})-(\d\d)-(\d\d)\b", _iso_date),
    _rule(rf"{_APART}(\d{{1,2}})/(\d{{1,2}})/(\d{{4}})\b", _slash_date),
    _rule(rf"\b{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?\b(?![:\d%.]\d)(?:,? (\d{{4}})\b)?", _month_first),
    _rule(rf"{_APART}(\d{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? (\d{{4}})\b)?", _day_first),
    _rule(rf"{_APART}(\d{{1,2}}):(\d\d)(?::\d\d)?{_HALF}?(?![\d:])", _time),
    _rule(rf"{_APART}(\d{{1,2}}){_HALF}", lambda m: f"{cardinal(int(m[1]))}{_half(m[2])}"),
    _rule(r"(?<![\w-])(\+?\d{1,2}[ -])?(\(?\d{3}\)?[ -])?\d{3}-\d{4}(?![\w-])", lambda m: _phone(m[0])),
    _rule(rf"([$£€¥])\s?({_N})(?:\s?[-–]\s?)\1?(?=\d)", lambda m: f"{_number(m[2])} to {m[1]}"),
    _rule(rf"([$£€¥])\s?({_N}){_BIG}", _money),
    _rule(rf"(?<![\w.])([-−])?({_N})\s?°\s?([CFK])?\b", _degrees),
    _rule(rf"(?<![\w.])([-−])?({_N})\s?°", lambda m: f"{'minus ' if m[1] else ''}{_number(m[2])} degrees"),
    _rule(rf"(?<![\w.,])({_N})(?:-|\s?–\s?)(?=\d)(?!\d+-)", lambda m: f"{_year_or_number(m[1])} to "),
    _rule(rf"(?<![\w.])([-−])?({_N})\s?({_UNIT_NAMES})(?![\w/²'])", _unit),
    _rule(rf"({_N})\s?%", lambda m: f"{_number(m[1])} percent"),
    _rule(r"\b(\d{1,3}(?:,\d{3})*)(?:st|nd|rd|th)\b", lambda m: ordinal(int(m[1].replace(",", "")))),
    _rule(rf"{_APART}(\d{{1,3}})/(\d{{1,3}})(?![\d/])", _fraction),
    _rule(r"[½¼¾⅓⅔]", lambda m: f" {_FRACTIONS[m[0]]}"),
    _rule(r"\b\d+(?:\.\d+){2,}\b", lambda m: " point ".join(_number(part) for part in m[0].split("."))),
    _rule(r"(?<=\d)\s?[×x*]\s?(?=\d)", " times "),
    _rule(r"(?<=\d)\s?:\s?(?=\d)", " to "),
    _rule(r"(?<=[\w)])\s?[×÷]\s?(?=[\w(])", lambda m: " times " if "×" in m[0] else " divided by "),
    _rule(r"(?<=\s)\*(?=\s)", "times"),
    _rule(r"(?<=[\w)])\s?\+\s?(?=[\w(])", " plus "),
    _rule(r"(?<=[\w)])\s?=\s?(?=[\w(])", " equals "),
    _rule(r"(?<=\s)<(?=\s|\d)", "less than "),
    _rule(r"(?<=\s)>(?=\s|\d)", "more than "),
    _rule(r"\s?&\s?", " and "),
    _rule(r"(?<=\d) ?- (?=\d)", " minus "),
    _rule(r"(?<!\w)[-−](?=\d)", "minus "),
    _rule(rf"({_N})(?=[A-Za-z])", lambda m: f"{_year_or_number(m[1])} "),
    _rule(_N, _bare),
    _rule(r"\s[-–—]\s|—", ", "),
    _rule(r"(?<=\w)–(?=\w)", " to "),
    _rule(r"…|\.{3,}", "..."),
    _rule(r"[\\^{}<>|~#*_°©®™§=\[\]]", " "),
)


def _phone(text: str) -> str:
    """Return a telephone number digit by digit, its groups apart."""
    return ", ".join(_digits(group) for group in re.findall(r"\d+", text))
