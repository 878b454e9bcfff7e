"""Programming problems with a solution that passes its tests: OSS-Instruct (Wei et al. 2023, arXiv:2312.02120)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from data.synthetic.recipes.base import Made, Messages, Recipe, Refused, Seed, dialogue, parts_of, user
from data.synthetic.sandbox import Sandbox, run_python

PROMPT = """\
Take the following code as inspiration for a new programming problem that stands on its own. Write the problem, a \
solution in Python that uses the standard library alone, and tests that are plain assert statements and call the \
solution. Use exactly this form:

Problem: ...
Solution:
```python
...
```
Tests:
```python
...
```

Code:
{text}"""

_BLOCK = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Code(Recipe):
    """A dialogue of problem and solution, where the tests pass with the solution and do not without it."""

    sandbox: Sandbox = Sandbox()

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [user(PROMPT.format(text=seed.text))]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        problem, solution, tests = parts_of(answer, "Problem", "Solution", "Tests")
        code, checks = _BLOCK.search(solution), _BLOCK.search(tests)
        if code is None or checks is None:
            raise Refused("format: no block of code")
        if "assert" not in checks[1]:
            raise Refused("tests: nothing is asserted")
        if failure := run_python(code[1] + "\n\n" + checks[1], self.sandbox):
            raise Refused(f"tests: {failure}")
        if not run_python(checks[1], self.sandbox):
            raise Refused("tests: pass without the solution")
        return [dialogue(problem, f"```python\n{code[1].strip()}\n```")]
