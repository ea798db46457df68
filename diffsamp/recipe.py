"""A recipe: everything that a generated picture depends on, kept in the picture itself.

A picture is repeated by running the batch it was made in again, since the last bits of a convolution depend on the
batch's size. On the same stack (versions, device, thread count) that is bit for bit.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import DiffsampError

_KEY = "diffsamp"


@dataclass(frozen=True)
class Recipe:
    """What was asked for. ``batch`` lists (seed, class or None) of the batch the picture was made in.

    A picture made with a corrector is particle ``slot`` of its seed's group and has the ``classes`` whose product it is
    drawn from; the batch then lists the groups.
    """

    model: str
    solver: str
    steps: int
    seed: int = 0
    batch: list[list[Any]] = field(default_factory=list)
    grid: str | None = None
    guidance_scale: float | None = None
    guidance: str | None = None
    corrector: str | None = None
    anneal: float | None = None
    classes: list[int] | None = None
    slot: int | None = None
    teleport: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    size: list[int] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_png(cls, path: Path) -> Recipe:
        """The recipe inside a picture. Raises DiffsampError where there is none."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                text = image.info.get(_KEY)
        except FileNotFoundError:
            raise DiffsampError(f"from: {path} does not exist") from None
        except (UnidentifiedImageError, OSError):
            raise DiffsampError(f"from: {path} is not a picture that can be read") from None
        if not text:
            raise DiffsampError(f"from: {path} carries no recipe; it was not made by diffsamp generate")
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            raise DiffsampError(f"from: the recipe in {path} is damaged or of another version") from None


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")} | {
        "diffsamp": __import__("diffsamp").__version__
    }


def png_bytes(image: Any, recipe: Recipe) -> bytes:
    """A PIL picture as PNG bytes with its recipe as text."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEY, recipe.to_json())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def labelled_grid(images: list[Any], labels: list[str], columns: int, scale: int) -> bytes:
    """PNG bytes of a sheet of pictures with a label under each; small pictures are magnified without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = images[0].width * scale, images[0].height * scale
    margin, text = 6, 16
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + text + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = margin + (k % columns) * (width + margin)
        y = margin + (k // columns) * (height + text + margin)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(resized, (x, y))
        draw.text((x + width / 2, y + height + 2), label, fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
