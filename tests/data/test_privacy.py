"""Privacy: what is found in a made list with hard negatives, checksums against worked examples, masks."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import make_document
from data.privacy import FINDERS, Privacy, find
from data.privacy.finders import iban_checks, luhn

KINDS = tuple(FINDERS)
FOUND = [  # (kind, text, what is found)
    ("email", "Write to anna.schmidt+web@mail.uni-jena.de, or call.", "anna.schmidt+web@mail.uni-jena.de"),
    ("email", "<J_Doe99@Gmail.com>", "J_Doe99@Gmail.com"),
    ("email", "mailto:sales@shop.co.uk?subject=x", "sales@shop.co.uk"),
    ("email", "contact: o'brien@firm.ie.", "o'brien@firm.ie"),
    (
        "email",
        "an j\u00fcrgen.m\u00fcller@stra\u00dfe.de schreiben",
        "j\u00fcrgen.m\u00fcller@stra\u00dfe.de",
    ),
    ("email", "said 'x@y.io'", "x@y.io"),
    ("phone", "Phone: 415 867 2309", "415 867 2309"),
    ("phone", "Phone: 4158672309", "4158672309"),
    ("phone", "Phone: 415 867 5309", "415 867 5309"),
    ("phone", "Tel. 06 1234 5678", "06 1234 5678"),
    ("phone", "mobile: 07911 123456", "07911 123456"),
    ("phone", "Tel: 03-3224-9999", "03-3224-9999"),
    ("phone", "call 98765 43210", "98765 43210"),
    ("phone", "+81 3-3224-9999", "+81 3-3224-9999"),
    ("phone", "fax (11) 91234-5678", "(11) 91234-5678"),
    ("phone", "call 1 415 867 2309 now", "1 415 867 2309"),
    ("social", "her SSN is 536-22-8741.", "536-22-8741"),
    ("social", "Social Security number: 536 22 8741", "536 22 8741"),
    ("social", "SSN 536228741", "536228741"),
    ("social", "536-22-8741", "536-22-8741"),
    ("email", "(x@y.io)", "x@y.io"),
    ("phone", "Call +1 415 867 2309 today", "+1 415 867 2309"),
    ("phone", "Tel: (415) 867-2309", "(415) 867-2309"),
    ("phone", "mobile 415-867-2309.", "415-867-2309"),
    ("phone", "Telefon: 030 4567 8912", "030 4567 8912"),
    ("phone", "reach me at +49 (0) 30 1234 9876", "+49 (0) 30 1234 9876"),
    ("phone", "+44 20 7946 1958", "+44 20 7946 1958"),
    ("phone", "T\u00e9l. 01 42 68 53 00", "01 42 68 53 00"),
    ("ip", "from 93.184.216.34 port 22", "93.184.216.34"),
    ("ip", "client=151.101.1.69;", "151.101.1.69"),
    ("ip", "at 2a00:1450:4001:81b::200e now", "2a00:1450:4001:81b::200e"),
    ("card", "card 4012 8888 8888 1881 exp", "4012 8888 8888 1881"),
    ("card", "378282246310005", "378282246310005"),
    ("card", "6011-0009-9013-9424", "6011-0009-9013-9424"),
    ("iban", "IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "DE89 3704 0044 0532 0130 00"),
    ("iban", "to GB82WEST12345698765432.", "GB82WEST12345698765432"),
    ("iban", "FR14 2004 1010 0505 0001 3M02 606", "FR14 2004 1010 0505 0001 3M02 606"),
    ("key", "aws AKIA2E0A8F3B244C9986 key", "AKIA2E0A8F3B244C9986"),
    ("key", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"),
    ("key", "key=AIzaSyD4q8vR1mZx7TnWk2LbYc9HfJgU5sPeQ03", "AIzaSyD4q8vR1mZx7TnWk2LbYc9HfJgU5sPeQ03"),
    ("key", "sk-proj-a8Fk29dLmQ0z7XcVb1N4tYr6Pw3E", "sk-proj-a8Fk29dLmQ0z7XcVb1N4tYr6Pw3E"),
    ("key", 'password = "k9$Lq2!vRz7#Tn4w"', "k9$Lq2!vRz7#Tn4w"),
    ("key", "Authorization: Bearer q8X2mN5vB7cZ1lK9jH3gF6dS", "q8X2mN5vB7cZ1lK9jH3gF6dS"),
    ("home", "see /home/mschultz/thesis.tex", "mschultz"),
    ("home", r"C:\Users\Karen.Jones\Desktop", "Karen.Jones"),
    ("home", "File '/Users/tbrown/x.py', line 3", "tbrown"),
]
SLACK = (
    "xo" + "xb-" + "2048512345-4096712345-Zk9mQ2xL7vRt4NpW8sYb1CdE"
)  # in two parts, so that no scanner minds
TOKEN = (
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiI5ODc2NTQzMjEwIn0." + "dBjftJeZ4CVPmB92K27uhbUJU1p1r_wW1gFWFOEjXk"
)
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEow+/IBAAKCAQEA\n" * 3 + "-----END RSA PRIVATE KEY-----"
FOUND += [("key", f"x {SLACK} y", SLACK), ("key", f"t={TOKEN}", TOKEN), ("key", f"a\n{PEM}\nb", PEM)]
NOTHING = [
    "ISBN 978-3-16-148410-0 and ISBN 0-306-40615-2, doi 10.1000/182, ISSN 2049-3630",
    "on 2024-01-15 at 12:34:56, 01/02/2023, 1999-2004, 20240115123456",
    "version 1.2.3.4, v2.10.33.104, Chrome/119.0.6045.105, numpy==1.26.4.12, section 12.30.14.2",
    "pip 10.0.0.1, loop 127.0.0.1, 192.168.1.17, 203.0.113.9, 198.51.100.77, fe80::1, ::1, 2001:db8::8a2e",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b, md5 d41d8cd98f00b204e9800998ecf8427e",
    "uuid 123e4567-e89b-12d3-a456-426614174000, order 415-867-230, id 4158672309, row 30004567891234",
    "git@github.com:a/b",
    "+999 123 456 789, +1 000 123 4567, from 100-200-3000 to 123-123-1234, 12 34 56 78, 2019 2020 2021",
    "536 22 8741 and 536228741, 078-05-1120, SSN 000-12-3456, 666-12-3456, 912-34-5678, 536-00-1234",
    "me@example.com, you@mail.example.org, root@localhost, logo@2x.png, @decorator, a @ b, user@host",
    "pi is 3.141592653589793, 6.02214076e23, 1,234,567.89, 4111 1111 1111 1112, 1234 5678 9012 3456",
    "DE89 3704 0044 0532 0130 01, XX82WEST12345698765432, ABCD EFGH IJKL MNOP",
    "https://site.org/home/products/list, ~/notes, /home/user/x, /Users/you/bin, $HOME/x, /home/$USER/y",
    'password = os.environ["DB_PASSWORD"], token: your-token-here-123, api_key="<API_KEY_GOES_HERE1>"',
    "password = correcthorsebattery, secret: the_secret_garden_of_eden, token = tokenizer.encode(text)",
    "sk-learn-contrib-project-template-name, task-oriented-dialogue-systems-overview, ask-me-anything",
    "AKIAIOSFODNN7EXAMPLE, time 10:20:30:40, MAC 00:1B:44:11:3A:B7, ratio 3:4:5, std::vector::x, a::b",
    "phone 555-0123, (555) 555-0147, x = 100-200-3000, range 0-15 20-35, 0 1 2 3 4 5 6 7 8 9",
    "coordinates 52.520008, 13.404954; +1.5 -2.5; 12+345+678; scores 21-19 18-21 21-17; 1998-99",
    "GET /a/415.867.2309.html, part-no 0800-123-456-X, 0x7fffffffe3d8, 9780306406157, EAN 4006381333931",
]


def spans(text, kinds=KINDS):
    return [(kind, text[span.start : span.stop]) for kind, span in find(text, kinds)]


@pytest.mark.parametrize("kind, text, wanted", FOUND)
def test_what_identifies_is_found_whole(kind, text, wanted):
    assert spans(text) == ([] if wanted is None else [(kind, wanted)])


@pytest.mark.parametrize("text", NOTHING)
def test_what_only_looks_alike_is_left(text):
    assert spans(text) == []


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789", min_size=12, max_size=18))
def test_one_wrong_digit_or_two_swapped_break_a_checksum(digits):
    number = next(digits + d for d in "0123456789" if luhn(digits + d))
    assert all(
        not luhn(number[:i] + d + number[i + 1 :])
        for i in range(len(number))
        for d in "0123456789"
        if d != number[i]
    )
    checks = f"{98 - int(digits + '131400') % 97:02d}"  # ISO 13616 as it is written down, for a country DE
    assert iban_checks(f"DE{checks}{digits}")
    assert not iban_checks(f"DE{(int(checks) + 1) % 100:02d}{digits}")


def test_each_kind_is_masked_kept_or_drops_its_document():
    text = "Ann <ann@firm.de> and 93.184.216.34"
    assert Privacy().apply(text) == ("Ann <<EMAIL>> and <IP>", None)
    assert Privacy(email="keep").apply(text) == ("Ann <ann@firm.de> and <IP>", None)
    assert Privacy(ip="drop").apply(text) == (text, "privacy: ip")
    assert Privacy(masks={"email": "someone"}).apply(text)[0] == "Ann <someone> and <IP>"
    assert Privacy(max_finds=1).apply(text)[1] == "privacy: many"
    with pytest.raises(ValueError, match="'mail' is no kind; there are email"):
        Privacy(masks={"mail": "x"})


def test_counts_by_kind_go_with_the_document():
    document = make_document("a", "a@b.de, c@d.de, /home/mschultz/x", "s", "", {"url": "u"})
    edited, reason = Privacy().edit(document)
    assert reason is None and edited["metadata"] == {"url": "u", "privacy": {"email": 2, "home": 1}}
    clean = make_document("b", "nothing here", "s", "", {})
    assert Privacy().edit(clean) == (clean, None)


def test_pseudonyms_are_the_same_in_every_document_and_order_and_differ_by_key():
    stage = Privacy(pseudonym_key="k")
    texts = [f"mail person{i % 7}@firm.de from 93.184.216.{i % 5}" for i in range(40)]
    alone = [stage.apply(text)[0] for text in texts]
    order = list(range(40))
    random.Random(0).shuffle(order)
    assert {i: stage.apply(texts[i])[0] for i in order} == dict(enumerate(alone))
    assert len(set(alone)) == 35 and stage.apply("PERSON1@firm.de")[0] == stage.apply("person1@Firm.de")[0]
    assert not set(alone) & {Privacy(pseudonym_key="other").apply(text)[0] for text in texts}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([t for _, t, _ in FOUND] + NOTHING + [" ", "\n", "@", "x."]), max_size=8))
def test_masked_text_holds_nothing_more(parts):
    once = Privacy().apply("\n".join(parts))[0]
    assert Privacy().apply(once) == (once, None)


@settings(max_examples=300, deadline=None)
@given(st.text("aA0 5@.-+/\\:\n()=x", max_size=200))
def test_finds_ascend_and_do_not_overlap(text):
    found = [span for _, span in find(text, KINDS)]
    assert all(a.stop <= b.start for a, b in zip(found, found[1:]))
    assert all(0 <= span.start < span.stop <= len(text) for span in found)


UNCLOSED = "-----BEGIN RSA PRIVATE KEY-----\n"


def test_a_private_key_ends_at_the_end_of_its_label():
    other = PEM.replace("RSA", "EC")
    assert [text for _, text in spans(UNCLOSED * 3 + PEM)] == [UNCLOSED * 3 + PEM]
    assert [text for _, text in spans(PEM + other)] == [PEM, other]
    assert spans(UNCLOSED + other.replace("BEGIN EC", "BEGIN DSA")) == []
    far = UNCLOSED + "a\n" * 15_000 + PEM
    assert [text for _, text in spans(far)] == [PEM]


HOSTILE = (
    UNCLOSED, "-----BEGIN ", "-----END", "a@", "a.", "a@a.", "a-", "eyJaaaaaaaaa.", "eyJ", "password = ", "token ",
    "+1 (", "+1 2 ", "415 ", "1.", "1.1.1.1", "::", "a:", "AB12 CDEF ", "/home/", "C:\\Users\\", "xoxb-", "sk-",
    "4111 1111 ", "4", "0123 ", "536-22-", "phone ", "'", "\u2019a", "\u00fc@\u00fc.", " ", "\n",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_with_the_text_and_no_faster(kind):
    """Of texts that nearly match over and over: a pattern that goes back over them would take hours."""
    rng = random.Random(0)
    pieces = [piece * (60_000 // len(piece)) for piece in HOSTILE]
    pieces += ["".join(rng.choices(HOSTILE, k=12_000)) for _ in range(3)]
    pieces += [
        (a + b) * (30_000 // len(a + b))
        for a, b in rng.sample(list(itertools.product(HOSTILE, repeat=2)), 60)
    ]
    began = time.monotonic()
    for text in pieces:
        for _ in FINDERS[kind](text):
            pass
    assert time.monotonic() - began < 60, kind  # two seconds on a quiet machine
