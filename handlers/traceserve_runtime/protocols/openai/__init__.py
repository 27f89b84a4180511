"""OpenAI's API, as its clients and compatible servers speak it: models, embeddings, completions, chat completions.

A model's base URL is /predictions/NAME/VERSION/v1.
"""

from __future__ import annotations

from traceserve_runtime.protocols.openai.embeddings import Embeddings, Models
from traceserve_runtime.protocols.openai.writing import Chat, Completions

__all__ = ["Chat", "Completions", "Embeddings", "Models"]
