"""Finds and decodes untrusted image files."""

from __future__ import annotations

import os
import stat
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # excludes formats whose decoders run other programs
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MAX_PIXELS = 100_000_000  # a larger picture is treated as a decompression bomb


class BadImageError(ValueError):
    """An image file that cannot be used; the message names the file and the reason."""


class ImageFolder:
    """Checks file names against one folder, asking the file system once per directory rather than once per file.

    Args:
        root: the folder; may be a symbolic link.
        caller: class name for messages.
    Raises: FileNotFoundError if it is not a folder.
    """

    def __init__(self, root: str | os.PathLike, caller: str = "CocoDataset"):
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"{caller}: image_dir must be an existing folder, got {os.fspath(root)!r}")
        self._listings: dict[str, dict[str, str] | None] = {}

    def _inside(self, path: str) -> bool:
        return os.path.commonpath([self.root, path]) == self.root

    def _listing(self, directory: str) -> dict[str, str] | None:
        """Entries of a sub-folder: name -> "file", "link" or "other"; None if the folder is outside the root."""
        if directory not in self._listings:
            path = os.path.realpath(os.path.join(self.root, directory))
            listing: dict[str, str] | None = None
            if self._inside(path):
                listing = {}
                if os.path.isdir(path):
                    with os.scandir(path) as entries:
                        for entry in entries:
                            plain = entry.is_file(follow_symlinks=False)
                            listing[entry.name] = "file" if plain else "link" if entry.is_symlink() else "other"
            self._listings[directory] = listing
        return self._listings[directory]

    def problem(self, name: str) -> tuple[str, str] | None:
        """Why `name` cannot be an image of this folder, as (reason, explanation); None if it can."""
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts or not path.parts:
            return "file name outside the image folder", "it must be a relative path without '..'"
        windows = PureWindowsPath(name)
        if os.name == "nt" and (windows.drive or windows.root or ".." in windows.parts):
            return "file name outside the image folder", "it must be a relative path without '..'"
        try:
            listing = self._listing(str(path.parent))
        except (OSError, ValueError) as error:
            return "image file missing", f"its folder cannot be read ({error})"
        if listing is None:
            return "file name outside the image folder", "its folder is a symbolic link out of the image folder"
        kind = listing.get(path.name)
        if kind is None:
            return "image file missing", f"there is no such file in {self.root}"
        if kind == "link":
            target = os.path.realpath(os.path.join(self.root, name))
            if not self._inside(target):
                return "file name outside the image folder", f"it is a symbolic link to {target}"
            kind = "file" if os.path.isfile(target) else "other"
        return None if kind == "file" else ("image file missing", "it is not a regular file")


def read_size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of an image file, from its header alone.

    Raises: BadImageError if the file is missing, not regular, not an image, or too large.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except BadImageError as error:
        raise BadImageError(f"image {path}: {error}") from None
    except Exception as error:  # decoders raise nearly anything on hostile files
        raise BadImageError(f"image {path}: cannot be read, {type(error).__name__}: {error}") from error
    if width * height > max_pixels:
        raise BadImageError(f"image {path}: {width} x {height} pixels are more than the limit of {max_pixels}")
    return width, height


def read_image(path: str, expected_size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image file.

    Args:
        path: file.
        expected_size: (width, height) according to the annotation.
        max_pixels: maximum of width * height; checked in the header, before decoding.
    Returns: [H, W, 3] uint8 RGB, read-only.
    Raises: BadImageError if the file is missing, not regular, not an image, too large, truncated, or of another size.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file, Image.open(file, formats=FORMATS) as image:
            found = f"{image.width} x {image.height} pixels"
            if image.width * image.height > max_pixels:
                raise BadImageError(f"{found} are more than the limit of {max_pixels}")
            if image.size != tuple(expected_size):
                raise BadImageError(f"it has {found}, the annotation says {expected_size[0]} x {expected_size[1]}")
            if image.mode not in MODES:
                raise BadImageError(f"pixel format {image.mode} is not 8 bits a channel")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # convert() copies
    except BadImageError as error:
        raise BadImageError(f"image {path}: {error}") from None
    except Exception as error:  # decoders raise nearly anything on hostile files: OSError, SyntaxError, struct.error
        raise BadImageError(f"image {path}: cannot be read, {type(error).__name__}: {error}") from error


def _open_regular(path: str, flags: int) -> int:
    """Opens a regular file; does not block if the path is a named pipe."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadImageError("it is not a regular file")
    return descriptor
