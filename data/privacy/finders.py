r"""Where a text holds what identifies a person or opens a door: one finder a kind, spans as (start, stop, value).

A finder is a pattern that is cheap to rule out, and a check that keeps numbers that only look alike: checksums, ranges
kept for documentation, the words around. Each looks at the text alone, so the order of documents means nothing.
"""

from __future__ import annotations

import bisect
import functools
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

EXAMPLE_DOMAINS = (
    "example.com",
    "example.org",
    "example.net",
    "example.edu",
    "test",
    "invalid",
    "localhost",
    "example",
)


class Span(NamedTuple):
    """Characters [start, stop) and the value, in one spelling, that a pseudonym is made of."""

    start: int
    stop: int
    value: str


# letters of any script: RFC 6531 allows them on both sides
_EMAIL = re.compile(
    r"(?<![\w.+%/-])(?<!\w['\u2019])(?!git@)[^\W_](?:[\w.%+'\u2019-]{0,62}[\w+-])?"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w@-])"
)
_FILE_ENDINGS = frozenset("png jpg jpeg gif svg webp js css py txt html json".split())  # logo@2x.png


def emails(text: str) -> Iterator[Span]:
    """Mail addresses that are nobody's example."""
    for match in _EMAIL.finditer(text) if "@" in text else ():
        domain = match[0].rpartition("@")[2].lower()
        known = any(domain == name or domain.endswith(f".{name}") for name in EXAMPLE_DOMAINS)
        if not known and domain.rsplit(".", 1)[-1] not in _FILE_ENDINGS and ".." not in match[0]:
            yield Span(match.start(), match.end(), match[0].lower())


_PHONE = re.compile(
    r"(?<![\w.+/#=-])(?<!\d[ ,:])"
    r"(?:\+(?P<country>[1-9]\d{0,2})[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}"
    r"|(?:1[ .-])?\([2-9]\d{2}\)[ .-]?\d{3}[ .-]\d{4}"
    r"|(?:1[ .-])?[2-9]\d{2}(?P<mark>[.-])\d{3}(?P=mark)\d{4}"
    r"|(?P<bare>(?:1[ .-]?)?[2-9]\d{2} ?\d{3} ?\d{4})"
    r"|0\d{1,4}(?P<space>[ /-])\d{2,4}(?:[ -]?\d{2,4}){1,3})"
    r"(?![\w-]|[.,:/]\d)"
)
_NATIONAL = re.compile(r"(?<![\w.+/#=-])(?<!\d[ ,:])\(?\d[\d ()./-]{5,18}\d(?![\w-]|[.,:/]\d)")
_REGIONS = (
    "US GB DE FR ES IT NL BE CH AT PL CZ SE NO DK FI PT GR IE AU NZ IN PK BD CN JP KR TW HK SG MY TH VN ID PH BR MX AR "
    "CO CL RU UA TR IL SA AE EG ZA NG KE IR"
).split()
_PHONE_WORD = re.compile(
    r"(?<!<)\b(?:tele?(?:ph|f)?on\w*|tel|phone|mobile|mobil|cell|fax|call|whatsapp|sms|tlf|handy|t\u00e9l)\b\W{0,12}$",
    re.I,
)
_NO_PHONE_WORD = re.compile(
    r"\b(?:isbn|issn|doi|order|invoice|serial|part|ref|id|no|number|version|pmid|sku)\b\W{0,6}$", re.I
)


def phones(text: str) -> Iterator[Span]:
    """Phone numbers by the numbering plans that phonenumbers knows: with a plus, North American with marks, and with a
    word for it before those of any of 50 countries."""
    found = 0
    for match in sorted((*_PHONE.finditer(text), *_NATIONAL.finditer(text)), key=re.Match.span):
        if match.start() < found:
            continue
        digits = re.sub(r"\D", "", match[0])
        before = text[max(match.start() - 24, 0) : match.start()]
        if not 7 <= len(digits) <= 15 or len(set(digits)) < 3 or "55501" in digits[-7:-2]:
            continue  # 555-01xx is kept for films
        named = _PHONE_WORD.search(before)
        if not named and _NO_PHONE_WORD.search(before):
            continue
        groups = match.groupdict()
        national = groups.get("space") or groups.get("bare") or match.re is _NATIONAL
        if named or not national:
            regions = tuple(_REGIONS) if named else ("US",)
            # A word before and so many digits are enough where no country is named.
            likely = named and match.re is _PHONE and len(digits) >= 8 and match[0][0] != "+"
            if likely or _is_phone(match[0], regions):
                found = match.end()
                yield Span(match.start(), match.end(), digits)


@functools.lru_cache(maxsize=1 << 14)
def _is_phone(number: str, regions: tuple[str, ...]) -> bool:
    """Whether the number is one that may be given out: with its country, or else in one of these regions."""
    import phonenumbers

    for region in ("ZZ",) if number.startswith("+") else regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


_IPV4 = re.compile(r"(?<![\w.@/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|::)[0-9A-Fa-f:]{2,40}(?![\w:.]\w)")
_VERSION_WORD = re.compile(
    r"(?:\b(?:version|ver|release|rev|build|section|chapter|firmware|driver|v|\u00a7|since|python|oid)|==|>=|<=|~=|[\w.-]-)\W{0,3}$",
    re.I,
)


def addresses(text: str) -> Iterator[Span]:
    """Public IP addresses: none of those kept for private nets, examples or loops, no versions like 1.2.3.4."""
    for match in _IPV4.finditer(text):
        parts = match[0].split(".")
        if all(len(part) == 1 for part in parts) or any(part != str(int(part)) for part in parts):
            continue
        if not _VERSION_WORD.search(text[max(match.start() - 16, 0) : match.start()]) and _is_public(
            match[0]
        ):
            yield Span(match.start(), match.end(), match[0])
    for match in _IPV6.finditer(text) if ":" in text else ():
        value = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
        if value.count(":") >= 2 and re.search(r"[0-9]", value) and _is_public(value):
            yield Span(match.start(), match.start() + len(value), value.lower())


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast and address not in ("8.8.8.8", "8.8.4.4", "1.1.1.1")


_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?P<mark>[ -]?)\d{4}(?P=mark)\d{4}(?P=mark)\d{1,7}(?![\w-]|\.\d)"
                   r"|(?<![\w.+-])3[47]\d{2}(?P<amex>[ -]?)\d{6}(?P=amex)\d{5}(?![\w-]|\.\d)")  # fmt: skip
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|6(?:011|5\d\d|4[4-9]\d)\d{12}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)


def cards(text: str) -> Iterator[Span]:
    """Credit cards: an issuer's prefix and length, and the check digit."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUERS.fullmatch(digits) and len(set(digits)) > 2 and luhn(digits):
            yield Span(match.start(), match.end(), digits)


def luhn(digits: str) -> bool:
    """ISO/IEC 7812: doubled every second from the right, digits summed, divisible by ten."""
    doubled = (int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![\w-])")
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU",
        31: "MT SC",
        32: "LC",
    }.items()
    for country in countries.split()
}


def ibans(text: str) -> Iterator[Span]:
    """Bank accounts: the country's length and the check digits; a following word in capitals is not taken in."""
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        if length is None:
            continue
        places = [i for i, character in enumerate(match[0]) if character != " "]
        if len(places) < length or (len(places) > length and match[0][places[length] - 1] != " "):
            continue
        stop = places[length - 1] + 1
        value = match[0][:stop].replace(" ", "")
        if iban_checks(value):
            yield Span(match.start(), match.start() + stop, value)


def iban_checks(value: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, one modulo 97."""
    return int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1


_SOCIAL = re.compile(
    r"(?<![\w.+/#=-])(?!000|666|9)\d{3}(?P<mark>[ -]?)(?!00)\d{2}(?P=mark)(?!0000)\d{4}(?![\w-]|[.,:/]\d)"
)
_SOCIAL_WORD = re.compile(r"(?<!<)\b(?:ssn|social security)\b[^\n\d]{0,24}\Z", re.I)


def social_security(text: str) -> Iterator[Span]:
    """Social Security numbers of the United States with their word before, or written 3-2-4 with hyphens."""
    for match in _SOCIAL.finditer(text):
        before = text[max(match.start() - 48, 0) : match.start()]
        named = _SOCIAL_WORD.search(before)
        if named or (match["mark"] == "-" and not _NO_PHONE_WORD.search(before)):
            if len(set(match[0]) - {"-", " "}) > 2 and match[0] not in _ADVERTISED:
                yield Span(match.start(), match.end(), re.sub(r"\D", "", match[0]))


_ADVERTISED = ("078-05-1120", "219-09-9999", "123-45-6789")  # printed on cards and forms, nobody's number

_PEM = re.compile(r"-----(?P<which>BEGIN|END) (?P<label>[A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?)-----|-----END")
_LONGEST_PEM = 20_000


def _private_keys(text: str) -> Iterator[Span]:
    """From the first BEGIN near enough to the END of its label, if no other END is between; in one pass."""
    begins: dict[str, list[re.Match[str]]] = {}
    for match in _PEM.finditer(text) if "-----" in text else ():
        if match["which"] == "BEGIN":
            begins.setdefault(match["label"], []).append(match)
            continue
        same = begins.get(match["label"] or "", [])
        first = bisect.bisect_left(same, match.start() - _LONGEST_PEM, key=lambda begin: begin.end())
        if first < len(same) and same[first].end() < match.start():
            begin = same[first]
            yield Span(begin.start(), match.end(), text[begin.start() : match.end()])
        begins = {}


_KEYS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{40,100}"  # GitHub
    r"|glpat-[A-Za-z0-9_-]{20,40}"  # GitLab
    r"|xox[abeoprs]-[A-Za-z0-9-]{20,250}|xapp-\d-[A-Za-z0-9-]{20,250}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{30,400}"  # Google
    r"|sk-(?:proj-|svcacct-|ant-[a-z0-9]{3,6}-|or-v1-)?[A-Za-z0-9_-]{20,200}"  # OpenAI and its like
    r"|[sr]k_live_[A-Za-z0-9]{20,100}"  # Stripe
    r"|hf_[A-Za-z0-9]{30,40}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,250}|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
    r"|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{10,2000}"  # JSON web token
    r")"
)
_ASSIGNED = re.compile(
    r"(?<![A-Za-z])(?:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|access[_-]?token|auth[_-]?token|token|passw(?:or)?d|pwd"
    r"|client[_-]?secret|private[_-]?key|bearer|credentials?)[\"']?\s{0,3}(?:[:=]{1,2}|=>|\s)\s{0,3}[\"']?"
    r"(?P<value>[A-Za-z0-9+/_=.~!@#$%^&*-]{12,200})",
    re.I,
)  # fmt: skip
_NO_SECRET = re.compile(
    r"example|xxxx|your|change|placeholder|dummy|sample|test|\.\.\.|<|os\.|env|getenv|self\.|config|\*\*\*",
    re.I,
)


def keys(text: str) -> Iterator[Span]:
    """Keys and tokens of known shapes, private key blocks, and what looks random behind "password =" and its like."""
    yield from _private_keys(text)
    for match in _KEYS.finditer(text):
        value = match[0]
        if entropy(value) > 3.0 and "EXAMPLE" not in value and not _is_words(value):
            yield Span(match.start(), match.end(), value)
    for match in _ASSIGNED.finditer(text):
        value = match["value"].rstrip(".,;'\"")
        start = match.start("value")
        if _looks_random(value) and not _NO_SECRET.search(value) and not _KEYS.match(text, start):
            yield Span(start, start + len(value), value)


def _looks_random(value: str) -> bool:
    """Letters and digits mixed, with more than 3.2 bits a character: no name, no path, no number."""
    kinds = (re.search("[a-z]", value), re.search("[A-Z]", value), re.search("[0-9]", value))
    return (
        len(value) >= 12
        and sum(kind is not None for kind in kinds) >= 2
        and bool(kinds[2])
        and entropy(value) > 3.2
        and "/" not in value[:1]
    )


def _is_words(value: str) -> bool:
    """sk-learn-contrib-something: a name of small words, no key."""
    return "sk-" == value[:3] and not re.search(r"\d", value)


def entropy(value: str) -> float:
    """Bits a character of the value's own distribution of characters."""
    counts = Counter(value).values()
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts) if value else 0.0


_HOME = re.compile(
    r"(?:(?<![\w.])/(?:home|Users)/|\b[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\{1,2}|\b[A-Za-z]:/Users/)"
    r"(?P<name>[^\s/\\:*?\"'<>|,;(){}\[\]$%]{1,40})(?=[/\\]|[\s\"'`,;:)\]>]|$)"
)
_SHARED_HOMES = frozenset(
    "user users username name yourname your_name your-username you me public shared default guest root admin ubuntu "
    "debian runner vagrant pi jovyan node app docker git www work travis circleci vsts linuxbrew all administrator "
    "example test somebody someone foo bar alice bob".split()
)


def home_folders(text: str) -> Iterator[Span]:
    """The name in /home/NAME, /Users/NAME and C:\\Users\\NAME, where it is somebody's."""
    for match in _HOME.finditer(text):
        name = match["name"].rstrip(".`")
        if name and name.lower() not in _SHARED_HOMES and not name.startswith(("~", ".", "-", "_", "@")):
            yield Span(match.start("name"), match.start("name") + len(name), name.lower())


FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {  # where two overlap, the earlier in this table has it
    "key": keys,
    "email": emails,
    "iban": ibans,
    "card": cards,
    "social": social_security,
    "phone": phones,
    "ip": addresses,
    "home": home_folders,
}


def find(text: str, kinds: tuple[str, ...]) -> list[tuple[str, Span]]:
    """(kind, span) of all finds, ascending, none overlapping another."""
    found: list[tuple[int, int, str, Span]] = []
    for kind in FINDERS:
        for span in FINDERS[kind](text) if kind in kinds else ():
            at = bisect.bisect(found, (span.start, span.stop))
            free_before = at == 0 or found[at - 1][1] <= span.start
            if free_before and (at == len(found) or span.stop <= found[at][0]):
                found.insert(at, (span.start, span.stop, kind, span))
    return [(kind, span) for _, _, kind, span in found]
