"""Answers of a given form: JSON schemas, regular expressions, choices and grammars (llguidance).

Every token is drawn from those after which the text can still become what was asked for, and the
answer may end exactly where it is.
"""

from core_splitfuse.serving.structured.grammars import Grammar, Grammars
from core_splitfuse.serving.structured.wanted import Wanted, json_grammar, read_wanted

__all__ = ["Grammar", "Grammars", "Wanted", "json_grammar", "read_wanted"]
