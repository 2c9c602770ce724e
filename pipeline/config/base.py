"""The base of all config sections. Used by the modules beside it."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: immutable, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
