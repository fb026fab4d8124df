"""What of a recipe decides a result: the settings that go into a stage's hash. Plain Python.

A field that has its neutral value is left out: so a field that a later version adds leaves the hashes of all runs that
do not use it as they were. The neutral value is the field's default. Should a default change, its old value goes into
`NEUTRAL`, or finished runs would silently count as made by the new one; `tests/test_golden_hashes.py` notices both.

The one exception is `precision`, which was float32 by default and is auto now: auto takes any arithmetic, so what is
finished stays right, and a run does not become stale by moving to another device. That float32 which an earlier version
left out stays left out: `as_it_was`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

SPEED_ONLY = {"checkpoint_every", "compile", "plan_config", "pretrained_tokens"}
"""How a job runs decides speed, not results (but for rounding, as the device does), and the last two decide only the
plan, `pretrained_tokens` also what the evaluation says of it (`btx.run_folder.stages_of_recipe`)."""
SAME_RESULT = {"on_spike": {"stop": "log"}}
"""Field → value → the one that it makes the same result as: a stage that was stopped has none, and goes on with log."""
NEUTRAL: dict[tuple[str, str], Any] = {}
"""(section's class, field) → the value that is left out, where it is no longer the default."""


def decisive(value: Any) -> Any:
    """Settings as a JSON value, recipe sections in them without fields that decide only speed or are neutral."""
    return _json(value, without_neutral=True)


def as_it_was(settings: Any, now: Any, begun: Mapping[str, Any] | None) -> Any:
    """Decisive settings of a stage, without what its folder shows with the same value and left out as neutral.

    Args:
        settings: what `decisive` gives.
        now: what `shown` gives.
        begun: started.json of the stage, with its `settings` and `shown` of then; None if there is none.
    """
    return settings if begun is None else _as_it_was(settings, now, begun["settings"], begun["shown"])


def _as_it_was(settings: Any, now: Any, settings_then: Any, then: Any) -> Any:
    if not all(isinstance(value, dict) for value in (settings, now, settings_then, then)):
        return settings
    return {
        name: _as_it_was(value, now.get(name), settings_then.get(name), then.get(name))
        for name, value in settings.items()
        if name in settings_then or name not in then or then[name] != now.get(name)
    }  # fmt: skip


def shown(value: Any) -> Any:
    """Settings as a JSON value with all defaults filled in, for people: which one changed, and from what to what."""
    return _json(value, without_neutral=False)


def neutral_value(section: type[BaseModel], field: str) -> Any:
    """The value with which a field changes nothing; pydantic's `PydanticUndefined` where one has to be given."""
    default = section.model_fields[field].get_default(call_default_factory=True)
    return NEUTRAL.get((section.__name__, field), default)


def _json(value: Any, without_neutral: bool) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields if name not in SPEED_ONLY}
        if without_neutral:
            fields = {name: SAME_RESULT[name].get(item, item) if name in SAME_RESULT else item
                      for name, item in fields.items()}  # fmt: skip
            fields = {name: item for name, item in fields.items() if item != neutral_value(type(value), name)}
        return _json(fields, without_neutral)
    if isinstance(value, dict):
        return {str(key): _json(item, without_neutral) for key, item in value.items()}
    return [_json(item, without_neutral) for item in value] if isinstance(value, list | tuple) else value
