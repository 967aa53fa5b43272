"""Graph forms: the same network written for a runtime in several ways, of which the fastest that
proves equal is shipped.
"""

from __future__ import annotations

from .form import FORMS, INT8_FORMS, STREAM_FORMS, Form, form_named
from .network import write_network

__all__ = ["FORMS", "INT8_FORMS", "STREAM_FORMS", "Form", "form_named", "write_network"]
