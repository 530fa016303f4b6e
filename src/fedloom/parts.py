"""Part: a frozen record of hyper-parameters that also holds its own pure functions, found by name within its family.

    class Algorithm(Part, family=True): ...
    class FedProx(FedAvg, name="fedprox"): mu: PositiveFloat = 0.01

A field annotated with a family accepts a bare name, a mapping with `name`, or an instance. Duplicate names are
errors; unknown names and keys are errors with a suggestion and the list of known ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fedloom.types import suggest


class Record(BaseModel):
    """A frozen pydantic record that refuses unknown keys; attribute docstrings are its help texts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _options_of_the_default_part(cls, value: Any) -> Any:
        """Read `sampler: {count: 10}` as options of the default part of that key."""
        if not isinstance(value, Mapping):
            return value
        named = dict(value)
        for key, field in cls.model_fields.items():
            given = named.get(key)
            if isinstance(field.default, Part) and isinstance(given, Mapping) and "name" not in given:
                named[key] = {"name": field.default.part_name, **given}
        return named

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_known_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's bare refusal of an unknown key into one that suggests the nearest known key."""
        try:
            return handler(value)
        except ValidationError as error:
            details = []
            for one in error.errors(include_url=False):
                detail: Any = {"loc": one["loc"], "input": one["input"]}
                if one["type"] == "extra_forbidden" and len(one["loc"]) == 1:
                    key, known = str(one["loc"][0]), sorted(cls.model_fields)
                    context = {"key": key, "hint": suggest(key, known), "known": ", ".join(known)}
                    message = "there is no key '{key}' here{hint} (known: {known})"
                    detail["type"] = PydanticCustomError("unknown_key", message, context)
                else:
                    finished: Any = one["msg"].removeprefix("Value error, ")
                    detail["type"] = PydanticCustomError(one["type"], finished)
                details.append(detail)
            raise ValidationError.from_exception_data(cls.__name__, details) from None


class Part(Record):
    """A named record of one family.

    Class attributes:
        part_name: the name it is registered under ("" for a family root).
        known: name -> class of the family, shared by all its members.
    """

    part_name: ClassVar[str] = ""
    family_name: ClassVar[str] = ""
    is_family: ClassVar[bool] = False
    known: ClassVar[dict[str, type[Part]]] = {}

    def __init_subclass__(cls, *, family: bool = False, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.part_name, cls.is_family = name, family
        if family:
            cls.family_name, cls.known = cls.__name__.lower(), {}
        elif name:
            if name in cls.known:
                raise TypeError(f"{cls.family_name} {name!r} is registered twice: {cls.known[name]} and {cls}")
            cls.known[name] = cls

    @classmethod
    def __pydantic_init_subclass__(cls, *, family: bool = False, name: str = "", **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)

    @classmethod
    def from_unknown(cls, name: str) -> Mapping[str, Any] | None:
        """Return the mapping that a name outside the registry stands for, or None if it stands for nothing.

        A family overrides this where names have a meaning of their own, such as the file names of sources.
        """
        return None

    @classmethod
    def resolve(cls, value: Any) -> Part:
        """Turn a name, a mapping with `name`, or an instance into a part of this family.

        Raises:
            pydantic.ValidationError: a key is unknown or a value is not allowed.
            PydanticCustomError: the value is not a part, or no part has that name.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            message = "expected the name of a {family} or a mapping with `name`; known: {known}"
            raise PydanticCustomError("part", message, {"family": cls.family_name, "known": ", ".join(cls.known)})
        name = value["name"]
        rest = {key: v for key, v in value.items() if key != "name"}
        if name not in cls.known and (mapping := cls.from_unknown(name)) is not None:
            name, rest = mapping["name"], {**{k: v for k, v in mapping.items() if k != "name"}, **rest}
        if name not in cls.known:
            message = "there is no {family} named '{name}'{hint} (known: {known})"
            context = {"family": cls.family_name, "name": name, "hint": suggest(name, cls.known)}
            raise PydanticCustomError("part_name", message, {**context, "known": ", ".join(sorted(cls.known))})
        return cls.known[name].model_validate(rest)

    def dump(self) -> dict[str, Any]:
        """Return the mapping, `name` first, that `resolve` turns back into this part."""
        return {"name": self.part_name, **self.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.is_family:
            return handler(source)
        serializer = core_schema.plain_serializer_function_ser_schema(lambda part: part.dump())
        return core_schema.no_info_plain_validator_function(cls.resolve, serialization=serializer)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if schema.get("type") != "function-plain":
            return handler(schema)
        choices: list[dict[str, Any]] = [{"enum": sorted(cls.known)}]
        for name, part in sorted(cls.known.items()):
            one = handler.resolve_ref_schema(handler(part.__pydantic_core_schema__))
            properties = {"name": {"const": name}, **one.get("properties", {})}
            choices.append({**one, "properties": properties, "required": ["name", *one.get("required", [])]})
        if cls.from_unknown.__func__ is not Part.from_unknown.__func__:  # type: ignore[attr-defined]
            choices.append({"type": "string"})
        return {"anyOf": choices}
