"""Web page and HTTP endpoint around the classifier; needs the extra ``serve``."""

from zepad_mm.serve.endpoint import create_app
from zepad_mm.serve.limits import BusyError
from zepad_mm.serve.run import serve
from zepad_mm.serve.service import ATTACKS, Service
from zepad_mm.serve.settings import ServeSettings

__all__ = ["ATTACKS", "BusyError", "ServeSettings", "Service", "create_app", "serve"]
