"""Makes images.safetensors: what TensorFlow's operations make of 20 synthetic frames (every fourth row and column).

    python images_tensorflow.py images.safetensors

Needs numpy, safetensors and tensorflow-cpu 2.x in an environment of its own; nothing of this package. The operations are
those of OpenVLA-OFT's evaluation: JPEG round trip, Lanczos-3 with antialiasing, centre crop of area 0.9.
"""

import sys

import numpy as np

SIZES = [256] * 14 + [64, 64, 128, 224, 480, 300]


def natural(seed: int, size: int) -> np.ndarray:
    """Shaded background, soft texture at several scales, and hard-edged shapes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([rng.uniform(40, 200) + rng.uniform(-80, 80) * x + rng.uniform(-80, 80) * y for _ in range(3)], -1)
    for octave in (2, 4, 8, 16, 32):
        coarse = rng.normal(0, 24 / octave**0.5, (octave + 1, octave + 1, 3))
        rows, columns = y[:, 0] * octave, x[0] * octave
        i, j = rows.astype(int), columns.astype(int)
        u, v = (rows - i)[:, None, None], (columns - j)[None, :, None]
        top = coarse[i][:, j] * (1 - v) + coarse[i][:, j + 1] * v
        bottom = coarse[i + 1][:, j] * (1 - v) + coarse[i + 1][:, j + 1] * v
        image += top * (1 - u) + bottom * u
    for _ in range(6):
        cx, cy, radius = rng.uniform(0.1, 0.9, 2).tolist() + [rng.uniform(0.04, 0.16)]
        inside = (
            (x - cx) ** 2 + (y - cy) ** 2 < radius**2
            if rng.random() < 0.5
            else np.maximum(abs(x - cx), abs(y - cy)) < radius
        )
        image[inside] = rng.uniform(10, 245, 3) + 30 * (x - cx)[inside, None]
    return image.clip(0, 255).astype(np.uint8)


def sample(image: np.ndarray, index: int) -> np.ndarray:
    return np.ascontiguousarray(image[index % 4 :: 4, index // 4 % 4 :: 4])


def original(frame: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    image = tf.io.decode_image(tf.image.encode_jpeg(frame), expand_animations=False, dtype=tf.uint8)
    image = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    side = np.float32(0.9) ** np.float32(0.5)
    low, high = (1 - side) / 2, (1 + side) / 2
    scaled = tf.image.convert_image_dtype(image, tf.float32)[None]
    cropped = tf.image.crop_and_resize(scaled, [[low, low, high, high]], [0], (224, 224))[0]
    return tf.image.convert_image_dtype(tf.clip_by_value(cropped, 0, 1), tf.uint8, saturate=True).numpy()


if __name__ == "__main__":
    from importlib.metadata import version

    from safetensors.numpy import save_file

    tensors = {f"prepared_{i:02d}": sample(original(natural(i, size)), i) for i, size in enumerate(SIZES)}
    about = {"command": "python images_tensorflow.py images.safetensors", "tensorflow": version("tensorflow-cpu")}
    save_file(tensors, sys.argv[1], about)
