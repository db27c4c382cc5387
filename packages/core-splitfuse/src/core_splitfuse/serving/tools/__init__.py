"""Calls of functions: OpenAI's ``tools`` for any chat model of transformers.

The model's chat template tells it of the tools; its answer is read as transformers says for its
tokenizer, or in the form that its template shows.
"""

from core_splitfuse.serving.tools.forms import FORMS
from core_splitfuse.serving.tools.messages import template_messages
from core_splitfuse.serving.tools.plans import Plan, Tools
from core_splitfuse.serving.tools.reader import Call, Delta, Reader

__all__ = ["FORMS", "Call", "Delta", "Plan", "Reader", "Tools", "template_messages"]
