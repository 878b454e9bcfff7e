"""Where a model's text is scored, parsed or run: a process without network, environment, files or time to spare.

A model's answer is untrusted input. Verifiers hand it to parsers that evaluate it, loop on it or die of it, so they
run here and nowhere else. On Linux the kernel holds the fence: seccomp (no sockets, no other processes, no programs)
and Landlock (no files but the interpreter's own and one empty folder). Other systems limit time and memory only; the
log says so once.
"""

from data.confined.limits import Limits, confine
from data.confined.pool import Outcome, Pool

__all__ = ["Limits", "Outcome", "Pool", "confine"]
