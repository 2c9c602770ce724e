"""Changes of an image's colours: brightness, contrast, saturation, hue, grayscale, blur, noise, in this order.

They come after the resize, so a blur of 2 pixels is one for the model whatever the image's own size. Pillow's kernels
are those that torchvision.transforms.v2 calls for Pillow images, with the same bits. v2 itself takes more than a second
to import in every loader process, and its tensor kernels are slower (800 x 1066 on one thread: hue 41 ms instead of 29,
blur 80 instead of 22). All of these run in one thread, so values do not depend on the number of threads. Nothing here
fails on an RGB image of at least one pixel.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from pipeline.config.augment import Extras
from pipeline.data.augment.draws import Draws

BYTES_PER_VALUE = 4  # the sum of four random bytes is close to a normal distribution
OCTETS_MEAN = BYTES_PER_VALUE * 127.5
OCTETS_DEVIATION = (BYTES_PER_VALUE * (256**2 - 1) / 12) ** 0.5


def change_colours(image: Image.Image, extras: Extras, draws: Draws) -> Image.Image:
    """The image with the drawn changes; the image itself if none is drawn.

    Args:
        image: RGB, at the size that is trained.
        extras: what may change and by how much.
        draws: of this sample.
    """
    if extras.brightness:
        image = ImageEnhance.Brightness(image).enhance(draws.between(1 - extras.brightness, 1 + extras.brightness))
    if extras.contrast:
        image = ImageEnhance.Contrast(image).enhance(draws.between(1 - extras.contrast, 1 + extras.contrast))
    if extras.saturation:
        image = ImageEnhance.Color(image).enhance(draws.between(1 - extras.saturation, 1 + extras.saturation))
    if extras.hue:
        image = turn_hue(image, draws.between(-extras.hue, extras.hue))
    if draws.happens(extras.grayscale):
        image = image.convert("L").convert("RGB")
    if draws.happens(extras.blur):
        image = image.filter(ImageFilter.GaussianBlur(draws.between(0, extras.blur_sigma)))
    if draws.happens(extras.noise):
        image = add_noise(image, draws.between(0, extras.noise_level), draws)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """The image with its colour circle turned by `turn`, where 1 is the whole circle."""
    shift = round(turn * 255) % 256
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def add_noise(image: Image.Image, deviation: float, draws: Draws) -> Image.Image:
    """The image with normal noise of this standard deviation in grey levels, another in each pixel and colour."""
    pixels = np.asarray(image)
    octets = draws.octets(pixels.size * BYTES_PER_VALUE).reshape(*pixels.shape, BYTES_PER_VALUE)
    sums = octets.sum(axis=-1, dtype=np.int32) - np.int32(OCTETS_MEAN)
    step = round(deviation / OCTETS_DEVIATION * 2**16)  # integers have the same sum on every machine
    noisy = pixels + ((sums * step + 2**15) >> 16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
