"""What a served model is asked, read from the OpenAPI document that it gives of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Tuple

from traceserve.errors import ServerError


@dataclass(frozen=True)
class InputField:
    """A field or a parameter: its JSON schema has its description, legal values and default."""

    name: str
    schema: Mapping[str, Any]
    required: bool = False

    @property
    def options(self) -> List[Mapping[str, Any]]:
        """The schemas of which one must hold."""
        options: List[Mapping[str, object]] = self.schema.get("anyOf") or [self.schema]
        return options

    @property
    def description(self) -> str:
        """What it is, in words."""
        return str(self.schema.get("description", ""))

    @property
    def is_text(self) -> bool:
        """Whether it is one text."""
        return self.schema.get("type") == "string"


@dataclass(frozen=True)
class Description:
    """A model as it describes itself."""

    name: str
    version: str
    task: str
    about: str  # how long texts may be, in what it computes
    fields: Tuple[InputField, ...]
    parameters: Tuple[InputField, ...]
    labels: Tuple[str, ...] = ()
    sample: Mapping[str, Any] = field(default_factory=dict)  # a body
    explains: bool = False  # whether its answers can be explained

    @property
    def long_field(self) -> str:
        """The field in which an answer's positions count: the last text that must be given."""
        texts = [own for own in self.fields if own.is_text]
        required = [own for own in texts if own.required]
        return (required or texts)[-1].name


def read_description(document: Mapping[str, Any], where: str) -> Description:
    """The description in an OpenAPI document; raises ServerError for one that is not of traceserve."""
    try:
        schemas: Dict[str, Any] = document["components"]["schemas"]
        fields, parameters = schemas["Fields"], schemas["Parameters"]["properties"]
        operation = document["paths"]["/"]["post"]
        [task] = operation["tags"]
        return Description(
            name=document["info"]["title"],
            version=document["info"]["version"],
            task=task,
            about=document["info"]["description"],
            fields=tuple(
                InputField(name, schema, name in fields["required"])
                for name, schema in fields["properties"].items()
                if name != "parameters"
            ),
            parameters=tuple(InputField(name, schema) for name, schema in parameters.items()),
            labels=tuple(schemas.get("Label", {}).get("enum", ())),
            sample=operation["requestBody"]["content"]["application/json"]["example"],
            explains="Explanation" in schemas,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{where} describes itself in another way than archives of this version of traceserve do ({error!r}); build the "
            "archive anew"
        ) from None
