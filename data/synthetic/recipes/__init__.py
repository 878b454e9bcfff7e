"""The recipes, each in its file with its prompts."""

from data.synthetic.recipes.base import Made, Recipe, Refused, Seed
from data.synthetic.recipes.code import Code
from data.synthetic.recipes.instructions import Backtranslate, EvolInstruct, QuestionAnswer, SelfInstruct
from data.synthetic.recipes.reasoning import Reasoning
from data.synthetic.recipes.rephrase import Rephrase
from data.synthetic.recipes.textbook import Textbook

AnyRecipe = (
    Rephrase | Textbook | QuestionAnswer | Backtranslate | SelfInstruct | EvolInstruct | Reasoning | Code
)

__all__ = [
    "AnyRecipe",
    "Backtranslate",
    "Code",
    "EvolInstruct",
    "Made",
    "QuestionAnswer",
    "Reasoning",
    "Recipe",
    "Refused",
    "Rephrase",
    "Seed",
    "SelfInstruct",
    "Textbook",
]
