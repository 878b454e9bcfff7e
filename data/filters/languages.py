"""What the heuristic filters take for a word, a sentence and a stop word in each language, so that no text is dropped
for not being English.

Thresholds stay those of the papers, for English; what they count is what differs. In scripts without spaces a word is
so many characters (`letters`), about as long as a word of that language is.
"""

from __future__ import annotations

import dataclasses

from data.filters.language import identify

_SURE = 0.5  # of the language, for other rules than English ones


@dataclasses.dataclass(frozen=True)
class LanguageRules:
    """`letters`: characters of a word in a script without spaces, 0 where spaces part words. `ends_sentences`: whether
    sentences end in a mark. Where `letters` is not 0, each letter is found as a word, and stop words anywhere."""

    stop_words: tuple[str, ...]
    letters: int = 0
    ends_sentences: bool = True

    def count(self, found: int) -> float:
        """How many words so many are that `words` found."""
        return found / self.letters if self.letters else found


ENGLISH = LanguageRules(("the", "be", "to", "of", "and", "that", "have", "with"))

LANGUAGES = {
    "en": ENGLISH,
    "zh": LanguageRules(tuple("的 了 是 在 和 有 不 这 一 为".split()), letters=2),
    "ja": LanguageRules(tuple("の に は を が で て と た も".split()), letters=2),
    "th": LanguageRules(tuple("ที่ การ และ ใน ของ เป็น มี ได้ ให้ จะ".split()), letters=4, ends_sentences=False),
    "lo": LanguageRules(tuple("ທີ່ ການ ແລະ ໃນ ຂອງ ເປັນ ມີ ໄດ້ ໃຫ້ ຈະ".split()), letters=4, ends_sentences=False),
    "km": LanguageRules(tuple("និង ការ នៅ ដែល ជា មាន បាន នៃ ក្នុង ទៅ".split()), letters=6),
    "my": LanguageRules(tuple("သည် ၏ ကို များ တွင် နှင့် မှ ၍ ရှိ ဖြစ်".split()), letters=6),
    "ar": LanguageRules(tuple("في من على أن إلى ما عن هذا هذه التي الذي أو لا كل".split())),
    "fa": LanguageRules(tuple("و در به از که این را با است برای آن".split())),
    "ur": LanguageRules(tuple("کے کی میں ہے اور سے کا کو اس نے پر".split())),
    "he": LanguageRules(tuple("של את על לא הוא עם זה כי או כל אדם גם היא".split())),
    "hi": LanguageRules(tuple("के का की है में से को और पर ने कि".split())),
    "bn": LanguageRules(tuple("এবং এই করে না ও থেকে জন্য তার বা হয়".split())),
    "ko": LanguageRules(tuple("및 수 있는 것 이 그 또는 모든 등 있다 대한 하는 의".split())),
    "ru": LanguageRules(tuple("и в не на что с по это как из к".split())),
    "uk": LanguageRules(tuple("і в не на що з та до як за це".split())),
    "bg": LanguageRules(tuple("и на да се от за в не е с".split())),
    "el": LanguageRules(tuple("και το να του η της με σε που για".split())),
    "de": LanguageRules(tuple("der die und das in zu den nicht von mit ist".split())),
    "nl": LanguageRules(tuple("de het een en van in is dat op te".split())),
    "fr": LanguageRules(tuple("de la le et les des en un que est dans".split())),
    "es": LanguageRules(tuple("de la que el en y los se un por con".split())),
    "pt": LanguageRules(tuple("de a o que e do da em um para com".split())),
    "it": LanguageRules(tuple("di e il la che in un per non del con".split())),
    "ca": LanguageRules(tuple("de la i el que en a els les per".split())),
    "ro": LanguageRules(tuple("de și în la a cu pe care nu din".split())),
    "pl": LanguageRules(tuple("i w na z się do nie że to o".split())),
    "cs": LanguageRules(tuple("a v na se je že s z do o".split())),
    "sk": LanguageRules(tuple("a v na sa je že s z do o".split())),
    "hu": LanguageRules(tuple("a az és hogy nem is egy van meg".split())),
    "hr": LanguageRules(tuple("i u je na se da za su od".split())),
    "sr": LanguageRules(tuple("и у је на се да за су од i u je na se da za su od".split())),
    "sv": LanguageRules(tuple("och i att det som en på är av för".split())),
    "da": LanguageRules(tuple("og i at det er en til på af for".split())),
    "no": LanguageRules(tuple("og i å det er en til på av for".split())),
    "fi": LanguageRules(tuple("ja on ei se että oli hän myös kuin tai".split())),
    "tr": LanguageRules(tuple("ve bir bu da de için ile her olan çok".split())),
    "vi": LanguageRules(tuple("và của là có được cho các trong một không".split())),
    "id": LanguageRules(tuple("dan yang di untuk dengan ini dari tidak pada atau".split())),
}


def rules_for(text: str, language: str) -> LanguageRules:
    """The rules of a language by its ISO 639 code, or of that which the text is in ("auto": English where unsure)."""
    if language == "auto":
        guess = identify(text)
        return LANGUAGES.get(guess.language, ENGLISH) if guess.score >= _SURE else ENGLISH
    return LANGUAGES[language]


def check_language(language: str) -> None:
    """Raises ValueError for a language without rules."""
    if language != "auto" and language not in LANGUAGES:
        raise ValueError(f"language={language!r}: there are rules for {', '.join(LANGUAGES)}, and auto")
