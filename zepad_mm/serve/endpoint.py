"""HTTP endpoint: FastAPI routes over a :class:`Service`.

Without ``from __future__ import annotations``, because FastAPI cannot resolve annotations local to a function.
"""

import base64
from collections import Counter
from typing import Annotated, Any, Literal, get_origin

from fastapi import Depends, FastAPI, File, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, StringConstraints

from zepad_mm import __version__
from zepad_mm.models.config import Policy
from zepad_mm.serve.gateway import DOCS, ENDPOINT, OPENAPI, Gateway, PageGuard
from zepad_mm.serve.limits import BusyError
from zepad_mm.serve.service import ATTACKS, Service, error_text, png
from zepad_mm.serve.settings import MAX_LEVELS, ServeSettings
from zepad_mm.utils.text import quoted

MOST_ERRORS = 5  # fields that one answer explains
EXAMPLE = """
Zero-shot classification that is robust to downstream-agnostic adversarial examples. For example, with the address that
`zepad serve` prints:

```
curl -s -F image=@photo.jpg -F labels="a cat" -F labels="a dog" -F evidence=true http://127.0.0.1:7860/v1/classify
```
"""


class Problem(BaseModel):
    """Reason for a refusal."""

    detail: Any


class Score(BaseModel):
    """Score of one label."""

    score: float = Field(ge=0, le=1)
    label: str
    flagged: bool | None = Field(None, description="with on_adversarial=flag: whether the image looks adversarial")


class GateView(BaseModel):
    """What the feature gate saw."""

    logit: float = Field(description="higher means that the image looks attacked")
    threshold: float | None = Field(description="where the weight of the benign branches is half of its largest value")


class Evidence(BaseModel):
    """Confidences, weights and suspicion score behind an answer."""

    confidences: dict[str, float] = Field(description="of each branch, in [0, 1]")
    weights: dict[str, float] = Field(description="of each branch in the fused answer; they sum to 1")
    score: float = Field(description="suspicion score; higher means more suspicious")
    detector: str = Field(description="name of that score")
    threshold: float | None = Field(description="the score above which an image is flagged; null: nothing is")
    flagged: bool | None = Field(description="whether it exceeds the threshold; null: no threshold")
    gate: GateView | None = Field(None, description="null: the model has no gate")
    undefended: list[Score] = Field(description="labels of the undefended public encoder")


class Answer(BaseModel):
    """Labels of an image."""

    labels: list[Score] = Field(description="best first; empty when on_adversarial=abstain withholds the answer")
    evidence: Evidence | None = None


class AttackAnswer(BaseModel):
    """An image before and after an attack."""

    attack: str
    epsilon: int = Field(description="L-inf budget in levels of 255")
    label: str = Field(description="the label that the attack moves away from")
    clean: Answer
    attacked: Answer
    image: str = Field(description="the attacked image as the public encoder sees it, a PNG in base64")


class ModelAnswer(BaseModel):
    """The served model."""

    version: str
    public_source: str
    branches: dict[str, str] = Field(description="name to role: robust or benign")
    fusion: str
    detector: str
    threshold: float | None
    policy: str = Field(description="of requests that name none")
    policies: dict[str, float] = Field(description="policy to the largest weight of the benign branches")
    attacks: dict[str, str]
    limits: dict[str, int]


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": Problem,
        "description": "not an image, not a form, an unknown field or template, or a field or label given twice",
    },
    413: {"model": Problem, "description": "the request is too large"},
    422: {"model": Problem, "description": "a field is missing or out of range"},
    503: {"model": Problem, "description": "all workers are busy and the queue is full; see Retry-After"},
}

# a browser at /docs would otherwise send all labels as one, joined by commas
FORM = {"encoding": {"labels": {"style": "form", "explode": True}}}
BODY = {"requestBody": {"content": {"multipart/form-data": FORM}}}


class App(FastAPI):
    """The application inside the :class:`Gateway`, which wraps what FastAPI sends from outside all middleware too."""

    def __init__(self, service: Service, host: str, **about: Any) -> None:
        super().__init__(**about)
        self.service = service
        self.bound = host
        self.page_guard: PageGuard | None = None

    def build_middleware_stack(self) -> Any:
        return Gateway(super().build_middleware_stack(), self.service.settings, self.bound, self.page_guard)


def create_app(service: Service, host: str = "127.0.0.1") -> App:
    """The application, with the page if the settings enable it.

    Args:
        service: what answers.
        host: address that the server listens on, which says under which names clients may reach it.
    """
    app = App(
        service,
        host,
        title="zepad",
        version=__version__,
        description=EXAMPLE,
        openapi_url=OPENAPI,
        docs_url=None,  # FastAPI's own loads scripts from another host
        redoc_url=None,
    )

    @app.exception_handler(BusyError)
    def busy(request: Request, error: BusyError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "2"})

    @app.exception_handler(ValueError)
    def bad(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": error_text(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        fields = [{key: item[key] for key in ("loc", "msg", "type")} for item in error.errors()[:MOST_ERRORS]]
        return JSONResponse({"detail": fields}, 422)  # without the values: they may be large

    _add_routes(app, service, service.settings)
    _add_docs(app)
    if service.settings.page:
        from zepad_mm.serve.page import mount

        _keep_from_page(app)
        app.page_guard = mount(app, service)
    return app


def _keep_from_page(app: FastAPI) -> None:
    """Answer all other requests below the endpoint, which the page, at ``/``, would answer as its own."""
    methods = {route.path: route.methods or () for route in app.routes if isinstance(route, APIRoute)}

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        allowed = ", ".join(sorted(methods.get(scope["path"], ())))
        status, detail = (405, "Method Not Allowed") if allowed else (404, "Not Found")
        await JSONResponse({"detail": detail}, status, {"Allow": allowed} if allowed else None)(scope, receive, send)

    app.mount(ENDPOINT.rstrip("/"), refuse)


def _add_docs(app: FastAPI) -> None:
    """The documentation of the routes, with scripts and styles from this machine: it works without a network."""
    static = f"{DOCS}/static"
    app.mount(static, StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get(DOCS, include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=OPENAPI,
            title="zepad",
            swagger_js_url=f"{static}/swagger-ui-bundle.js",
            swagger_css_url=f"{static}/swagger-ui.css",
            swagger_favicon_url=f"{static}/favicon.png",
        )


def _add_routes(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    text = StringConstraints(min_length=1, max_length=settings.max_label_length)
    image = Annotated[bytes, File(description=f"PNG, JPEG, WebP, GIF, BMP or TIFF, at most {settings.upload_mb} MB")]
    labels = Annotated[
        list[Annotated[str, text]],
        Form(min_length=1, max_length=settings.max_labels, description="candidate labels; repeat the field for each"),
    ]
    template = Annotated[str, text, Form(description="prompt set (photo, single, ...) or a template with one {}")]

    @app.get("/v1/health")
    def health() -> dict[str, str]:
        """Health check."""
        return {"status": "ok"}

    @app.get("/v1/model")
    def model() -> ModelAnswer:
        """The served model and its limits."""
        config = service.classifier.model.config
        return ModelAnswer(
            version=__version__,
            public_source=config.public_source,
            branches={branch.name: branch.role for branch in config.branches},
            fusion=config.fusion,
            detector=config.detector.score,
            threshold=config.detector.threshold,
            policy=config.policy,
            policies=config.policy_caps,
            attacks=ATTACKS,
            limits=settings.limits(),
        )

    checked: dict[str, Any] = {
        "responses": REFUSALS, "openapi_extra": BODY, "dependencies": [Depends(refuse_fields_without_effect)]
    }  # fmt: skip

    @app.post("/v1/classify", **checked)
    def classify(
        image: image,  # type: ignore[valid-type]
        labels: labels,  # type: ignore[valid-type]
        template: template = "photo",  # type: ignore[valid-type]
        top_k: Annotated[int | None, Form(ge=1)] = None,
        evidence: Annotated[bool, Form()] = False,
        on_adversarial: Annotated[Literal["ignore", "flag", "abstain"], Form()] = "ignore",
        policy: Annotated[Policy | None, Form(description="for models with a gate; empty: the server's")] = None,
    ) -> Answer:
        """Classify an image among labels."""
        found = service.classify(
            image, labels, template, top_k=top_k, evidence=evidence, on_adversarial=on_adversarial, policy=policy
        )
        return Answer.model_validate(found if evidence else {"labels": found})

    @app.post("/v1/attack", **checked)
    def attack(
        image: image,  # type: ignore[valid-type]
        labels: labels,  # type: ignore[valid-type]
        template: template = "photo",  # type: ignore[valid-type]
        attack: Annotated[Literal["universal", "public", "white_box"], Form()] = "universal",
        epsilon: Annotated[int, Form(ge=0, le=MAX_LEVELS, description="L-inf budget in levels of 255")] = 8,
        label: Annotated[str | None, text, Form(description="true label, one of the labels")] = None,
        policy: Annotated[Policy | None, Form(description="for models with a gate; empty: the server's")] = None,
    ) -> AttackAnswer:
        """Attack an image and classify it before and after."""
        found = service.attack(image, labels, template, attack=attack, levels=epsilon, label=label, policy=policy)
        return AttackAnswer(
            attack=attack,
            epsilon=epsilon,
            label=found.label,
            clean=Answer.model_validate(found.before),
            attacked=Answer.model_validate(found.after),
            image=base64.b64encode(png(found.attacked)).decode(),
        )


async def refuse_fields_without_effect(request: Request) -> None:
    """Raise ValueError for unknown fields and for fields given more than once, except lists."""
    known = {field.alias: field.field_info.annotation for field in request.scope["route"].dependant.body_params}
    given = Counter(name for name, _ in (await request.form()).multi_items())
    unknown = [name for name in (*request.query_params, *given) if name not in known]
    if unknown:
        raise ValueError(f"{quoted(unknown[0])} is not a field of this request; expected {', '.join(known)}")
    if request.query_params:
        raise ValueError(f"{quoted(next(iter(request.query_params)))}: expected in the form, got it in the address")
    for name, count in given.items():
        if count > 1 and get_origin(known[name]) is not list:
            raise ValueError(f"{name}: expected once, got it {count} times")
