"""Draws regions over an image: a translucent fill, a contour and a number each, and a legend below; or heat.

Regions' colours are Okabe and Ito's palette, which readers with any common colour blindness can tell apart; the
numbers say the same without colour.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage


PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
MIN_SIDE, MAX_SIDE = 512, 2048
FILL_OPACITY = 0.35
FONT_SIZE = 16
LINE_HEIGHT = 26
MARGIN = 8
# Black, purple, orange, yellow: rises evenly in lightness, so that it reads without colour too.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)


def draw_overlay(image: Image.Image, masks: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """Draws `masks` over `image`, with a legend of `labels`.

    Args:
        image: RGB, width x height pixels. Its longer side is drawn at 512 to 2,048 pixels, whatever its own size.
        masks: one boolean array a region, of one size: the image's, or of a slice with oblong pixels its own. An empty
            one only gets its legend line.
        labels: one legend text a region, cut with an ellipsis where it is too long for the picture.

    Raises:
        ValueError: a mask has neither the image's height nor its width, or there are more or fewer labels than masks.
    """
    size = image.height, image.width
    # One side of a slice whose pixels are oblong is drawn out.
    if len(masks) != len(labels) or any(mask.shape[0] != size[0] and mask.shape[1] != size[1] for mask in masks):
        shapes = [mask.shape for mask in masks]
        raise ValueError(f"expected a label a mask, and masks of {size}: got {len(labels)} labels, masks of {shapes}")
    return add_legend(draw_regions(image, masks, readable_side(image)), labels)


def readable_side(image: Image.Image, least: int = MIN_SIDE, most: int = MAX_SIDE) -> int:
    """Pixels to draw the longer side of an image at: its own, within bounds."""
    return min(max(*image.size, least), most)


def scaled_size(image: Image.Image, longer_side: int) -> tuple[int, int]:
    """(width, height) of an image whose longer side becomes `longer_side` pixels."""
    scale = longer_side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def draw_regions(image: Image.Image, masks: Sequence[np.ndarray], longer_side: int) -> Image.Image:
    """Draws `masks` over an RGB `image` whose longer side becomes `longer_side` pixels.

    An empty mask keeps its colour and number to itself.
    """
    size = scaled_size(image, longer_side)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32).copy()
    drawn = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    for index, mask in enumerate(drawn):
        color = np.array(PALETTE[index % len(PALETTE)], dtype=np.float32)
        pixels[mask] += FILL_OPACITY * (color - pixels[mask])
    line = max(2, max(size) // 256)
    for index, mask in enumerate(drawn):
        if mask.any():
            # The dark rim keeps a contour visible where the tissue has the contour's own colour.
            pixels[ndimage.binary_dilation(mask, iterations=line // 2) & ~mask] = 0
            pixels[mask & ~ndimage.binary_erosion(mask, iterations=line)] = PALETTE[index % len(PALETTE)]
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    number_regions(picture, drawn)
    return picture


def heat_map(picture: Image.Image, probabilities: np.ndarray) -> Image.Image:
    """A picture in grey with probabilities over it as heat: where they are low, the picture shows.

    Args:
        probabilities: (h, w) float, a grid over the whole picture; interpolated.
    """
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    values = np.asarray(
        Image.fromarray(probabilities.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    )
    place = values.clip(0, 1) * (len(HEAT) - 1)
    below = np.floor(place).astype(int).clip(0, len(HEAT) - 2)
    color = HEAT[below] + (place - below)[..., None] * (HEAT[below + 1] - HEAT[below])
    opacity = 0.85 * values.clip(0, 1)[..., None]
    return Image.fromarray((grey + opacity * (color - grey)).round().clip(0, 255).astype(np.uint8))


def number_regions(picture: Image.Image, masks: Sequence[np.ndarray]) -> None:
    """Writes each region's number, counted from 1, at the point of it that lies deepest inside."""
    canvas = ImageDraw.Draw(picture)
    font_size = max(FONT_SIZE, max(picture.size) // 48)
    font = ImageFont.load_default(font_size)
    for index, mask in enumerate(masks):
        if not mask.any():
            continue
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        text = str(index + 1)
        half_width, half_height = font.getlength(text) / 2 + 2, font_size / 2 + 2
        center = (
            min(max(float(x), half_width), max(half_width, picture.width - half_width)),
            min(max(float(y), half_height), max(half_height, picture.height - half_height)),
        )
        canvas.text(center, text, fill="white", font=font, anchor="mm", stroke_width=2, stroke_fill="black")


def add_legend(picture: Image.Image, labels: Sequence[str], note: str | None = None) -> Image.Image:
    """The picture on a white sheet at least 512 pixels wide; below it one line per label, with its colour and number.

    `note`, where given, is a last line of its own.
    """
    font = ImageFont.load_default(FONT_SIZE)
    lines = [f"{index + 1}  {label}" for index, label in enumerate(labels)] or ["no region cited"]
    lines += [note] if note else []
    width = max(picture.width, MIN_SIDE)
    sheet = Image.new("RGB", (width, picture.height + 2 * MARGIN + LINE_HEIGHT * len(lines)), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    canvas = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        middle = picture.height + MARGIN + LINE_HEIGHT * index + LINE_HEIGHT // 2
        left = MARGIN
        if index < len(labels):
            box = (MARGIN, middle - FONT_SIZE // 2, MARGIN + FONT_SIZE, middle + FONT_SIZE // 2)
            canvas.rectangle(box, fill=PALETTE[index % len(PALETTE)], outline="black")
            left += FONT_SIZE + MARGIN
        canvas.text((left, middle), shorten(line, width - left - MARGIN, font), fill="black", font=font, anchor="lm")
    return sheet


def contact_sheet(
    title: str, subtitle: str, tiles: Sequence[tuple[Image.Image, str]], side: int = 160, columns: int = 4
) -> Image.Image:
    """Pictures on a white sheet, a caption below each.

    Args:
        tiles: each picture, at most `side` pixels wide and high, and its caption, cut where it is too long.
    """
    large, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(12)
    rows, line = -(-len(tiles) // columns), 18
    width = min(columns, max(2, len(tiles))) * (side + MARGIN) + MARGIN
    top, cell = 2 * MARGIN + 24 + line, side + line + MARGIN
    sheet = Image.new("RGB", (width, top + rows * cell), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, MARGIN), shorten(title, width - 2 * MARGIN, large), fill="black", font=large)
    canvas.text((MARGIN, MARGIN + 24), shorten(subtitle, width - 2 * MARGIN, small), fill="#444", font=small)
    for number, (picture, caption) in enumerate(tiles):
        left, y = MARGIN + number % columns * (side + MARGIN), top + number // columns * cell
        sheet.paste(picture, (left, y))
        canvas.text((left, y + side + 2), shorten(caption, side, small), fill="black", font=small)
    return sheet


def shorten(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut with an ellipsis to at most `width` pixels in `font`."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end] + "…")) - 1
    return text[: max(0, fitting)] + "…"
