"""Bodies of requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Point = Annotated[list[Number], Field(min_length=3, max_length=4, description="i, j, k and perhaps +1 or -1")]
Box = Annotated[list[Number], Field(min_length=6, max_length=6, description="i0, j0, k0, i1, j1, k1")]
Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Tokens = Annotated[int, Field(ge=1, le=8192)]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "medvl-sam2"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VolumeInfo(BaseModel):
    """An uploaded scan."""

    id: str
    object: Literal["volume"] = "volume"
    name: str = Field(description="File name as the client gave it")
    bytes: int
    created: int
    expires: int = Field(description="Unix time at which it is deleted unless it is used before")
    shape: list[int] = Field(description="In the file's own index order (i, j, k)")
    spacing_mm: list[float] = Field(description="Along i, j, k")
    warnings: list[str]


class VolumeList(BaseModel):
    """The scans of one key."""

    object: Literal["list"] = "list"
    data: list[VolumeInfo]


class Deleted(BaseModel):
    """A scan that is gone."""

    id: str
    object: Literal["volume.deleted"] = "volume.deleted"
    deleted: Literal[True] = True


class Rle(BaseModel):
    """A mask as run lengths, beginning with background.

    `numpy.repeat(numpy.arange(len(counts)) % 2, counts).reshape(shape, order="F")` is the mask in the order in which
    nibabel gives the scan's own voxels.
    """

    shape: list[int]
    counts: list[int]


class Mask(BaseModel):
    """One segmented object."""

    id: str = Field(description="For refinement and download")
    object: Literal["mask"] = "mask"
    volume_id: str
    name: str
    absent: bool = Field(description="The model answered that there is no such thing")
    text: str = Field(description="The model's answer")
    volume_ml: float
    box: list[int] | None = Field(description="i0, j0, k0, i1, j1, k1 in the file's own index, both corners inside")
    rle: Rle


class MaskList(BaseModel):
    """Several objects, in the order in which they were asked for."""

    object: Literal["list"] = "list"
    data: list[Mask]


class SegmentRequest(BaseModel):
    """What to segment."""

    model_config = ConfigDict(extra="forbid")
    target: Text | None = Field(None, description="Name, description, or a whole request that ends in punctuation")
    targets: Annotated[list[Text], Field(min_length=1, max_length=32)] | None = Field(
        None, description="Several of them, as one batch; the answer is a list of masks"
    )
    points: list[Point] | None = Field(None, max_length=256)
    box: Box | None = None
    space: Literal["voxel", "ras", "lps"] = Field("voxel", description="Of points and box: index, or millimetres")
    mask_id: str | None = Field(None, description="Refine this mask: the points are added to those it was made from")
    format: Literal["rle", "nifti"] = "rle"

    @model_validator(mode="after")
    def _something(self) -> "SegmentRequest":
        if self.targets is not None:
            others = (self.target, self.points, self.box, self.mask_id)
            if any(other is not None for other in others) or self.format != "rle":
                raise ValueError("targets: expected nothing beside them, and format rle; download masks by their ids")
        elif self.mask_id is not None:
            if not self.points or self.target is not None or self.box is not None:
                raise ValueError("mask_id: expected points to add, and neither target nor box")
        elif self.target is None and not self.points and self.box is None:
            raise ValueError("target: expected a name, a description, points or a box")
        return self


class ReportRequest(BaseModel):
    """How long a report may be."""

    model_config = ConfigDict(extra="forbid")
    max_tokens: Tokens = 512


class Report(BaseModel):
    """A report of a scan."""

    object: Literal["report"] = "report"
    volume_id: str
    text: str
    tokens: int
    seconds: dict[str, float]


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of the conversation."""

    role: Literal["user", "assistant"] = Field(description="The model's system message is fixed")
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def words(self) -> str:
        """The text of the turn."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """See OpenAI's reference."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """OpenAI's chat request, with the scan that it is about.

    Decoding is greedy; parameters of sampling are accepted and have no effect.
    """

    model: str
    volume_id: str = Field(description="Of an uploaded scan; `extra_body` of OpenAI's client")
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _turns(self) -> "ChatRequest":
        roles = [message.role for message in self.messages]
        if roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))] or roles[-1] != "user":
            raise ValueError("messages: expected user and assistant in turn, from a user's to a user's")
        return self

    @property
    def limit(self) -> int:
        """Most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or 512


class Usage(BaseModel):
    """Tokens of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    segmentations: list[Mask] = Field(description="One for each [SEG] of the answer, in order")


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """OpenAI's answer.

    The chunks of a stream have `delta` in place of `message`, with `segmentation` in it where a mask came.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok"] = "ok"
    version: str
    model: str
    device: str


def chunk(head: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One piece of a streamed answer, as OpenAI has it."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}
