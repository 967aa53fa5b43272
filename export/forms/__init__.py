"""Graph forms: the same network written for a runtime in several ways.

The fastest one whose outputs match the model's is shipped.
"""

from __future__ import annotations

from .form import FORMS, INT8_FORMS, STREAM_FORMS, Form, form_named
from .network import write_network

__all__ = ["FORMS", "INT8_FORMS", "STREAM_FORMS", "Form", "form_named", "write_network"]
