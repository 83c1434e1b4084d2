"""`python -m sidecar encode`: photos in, their embeddings as a safetensors file and as pictures to look at.

Each photo is a call of its own: its round trip is then its own, and no number of photos outgrows the server's limit on
one message.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, TensorSpec, serialize_file

from sidecar.client import ClientError, Embedding, EncodeError, EncoderClient, ProtocolError
from sidecar.commands import (
    BAD_ARGUMENTS,
    FAILED,
    INTERRUPTED,
    NO_SERVER,
    add_server_argument,
    positive_float,
    positive_int,
    print_error,
    print_no_server,
    printable,
)
from sidecar.commands.connection import FleetClient, add_credential_arguments, names_several, open_client
from sidecar.credentials import CredentialsError
from sidecar.fleet import AddressError
from sidecar.picture import draw_components
from sidecar.vision.dtypes import Array
from sidecar.vision.images import decode_image
from sidecar.vision.pixels import PixelError

# Wide enough to see every token of a 1080p photo.
_PICTURE_SIDE = 1024

_NAMES = """\
In --out, the embedding of a/cat.jpg is the tensor "cat.jpg" and its grid the int64 tensor "cat.jpg.grid_thw". Photos
that share a file name are all named by their paths as given ("a/cat.jpg", "b/cat.jpg"); a photo given twice is encoded
once.

--picture PICTURE.png with one photo writes that file; with several, one file each beside it, PICTURE-cat.jpg.png. A
directory gets cat.jpg.png. A "/" in a name becomes "_".
"""


@dataclass(frozen=True, slots=True)
class _Photo:
    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class _Encoded:
    photo: _Photo
    embedding: Embedding
    round_trip_ms: float


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="encode photos and save or draw their embeddings",
        description="Encode photos, print a line for each, and save or draw their embeddings.",
        epilog=_NAMES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", metavar="PHOTO", nargs="+", type=Path)
    add_server_argument(parser)
    add_credential_arguments(parser)
    parser.add_argument("--out", metavar="FILE.safetensors", type=Path, help="save embeddings and grids")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="draw each photo beside its embedding")
    parser.add_argument(
        "--min-pixels", metavar="N", type=positive_int, help="least area after resizing (default: the model's)"
    )
    parser.add_argument(
        "--max-pixels", metavar="N", type=positive_int, help="largest area after resizing (default: the model's)"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=positive_float, default=120.0, help="for each photo (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, also for photos that failed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        photos = name_photos(arguments.photos)
        pictures = {} if arguments.picture is None else name_pictures(arguments.picture, photos)
        # Found out before minutes of encoding rather than after.
        for target in filter(None, (arguments.out, *pictures.values())):
            if not target.parent.is_dir():
                raise ValueError(f"{target}: there is no directory {target.parent}")
            if target.is_dir():
                raise ValueError(f"{target}: is a directory")
            # A file that appears whole takes the place of what has its name: of a device, too.
            if target.exists() and not target.is_file():
                raise ValueError(f"{target} is not a regular file")
    except ValueError as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    try:
        with FleetClient(arguments) if names_several(arguments) else open_client(arguments) as client:
            return _encode_all(client, photos, pictures, arguments)
    except (AddressError, CredentialsError) as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED


def name_photos(paths: Sequence[Path]) -> list[_Photo]:
    """Photos under the names that `_NAMES` promises.

    Raises:
        ValueError: if a name would be that of another photo's grid.
    """
    paths = list(dict.fromkeys(paths))
    count = Counter(path.name for path in paths)
    # Tensor names are UTF-8, which file names need not be.
    photos = [_Photo(path, printable(path.name if count[path.name] == 1 else str(path))) for path in paths]
    taken = Counter(name for photo in photos for name in (photo.name, _grid_name(photo)))
    for name, times in taken.items():
        if times > 1:
            raise ValueError(f"two tensors would be named {name!r}; rename a photo or encode them one by one")
    return photos


def name_pictures(target: Path, photos: Sequence[_Photo]) -> dict[_Photo, Path]:
    """Where each photo's picture goes.

    Raises:
        ValueError: if two would go to one file.
    """
    labels = {photo: photo.name.replace("/", "_") + ".png" for photo in photos}
    if target.is_dir():
        pictures = {photo: target / label for photo, label in labels.items()}
    elif len(photos) == 1:
        pictures = {photos[0]: target}
    else:
        pictures = {photo: target.with_name(f"{target.stem}-{label}") for photo, label in labels.items()}
    if len(set(pictures.values())) < len(photos):
        raise ValueError("two photos' pictures would have one name; draw them one by one")
    return pictures


def save(path: Path, encoded: Sequence[_Encoded]) -> None:
    """Write tensors and grids as safetensors, dtypes kept; the file appears whole or not at all.

    Raises:
        ValueError: if the embeddings are of different models.
        OSError, SafetensorError: if the file cannot be written.
    """
    fingerprints = sorted({one.embedding.fingerprint for one in encoded})
    if len(fingerprints) != 1:
        raise ValueError(f"{path} not written: the embeddings are of different models ({', '.join(fingerprints)})")
    grids = {_grid_name(one.photo): np.array(one.embedding.grid, np.int64) for one in encoded}
    tensors = {name: _tensor("int64", grid) for name, grid in grids.items()}
    tensors |= {one.photo.name: _tensor(str(one.embedding.dtype), one.embedding.data) for one in encoded}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        serialize_file(tensors, temporary, {"fingerprint": fingerprints[0], "format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode_all(
    client: EncoderClient | FleetClient,
    photos: Sequence[_Photo],
    pictures: Mapping[_Photo, Path],
    arguments: argparse.Namespace,
) -> int:
    encoded: list[_Encoded] = []
    status = 0
    heard = False
    for photo in photos:
        try:
            one = _encode(client, photo, arguments)
        except (OSError, ClientError, ValueError) as error:
            if isinstance(error, EncodeError) and error.code == "UNAVAILABLE" and not heard:
                print_no_server(arguments.server, error)
                return NO_SERVER
            heard = heard or isinstance(error, ClientError)
            _report_failure(photo, error, arguments.json)
            status = FAILED
            continue
        heard = True
        encoded.append(one)
        _report(one, arguments.json)
        if photo in pictures:
            try:
                _draw(pictures[photo], one)
            except (OSError, PixelError, ValueError) as error:
                print_error(f"{photo.path}: no picture: {error}")
                status = FAILED
    if arguments.out is not None and encoded:
        try:
            save(arguments.out, encoded)
        except (OSError, SafetensorError, ValueError) as error:
            print_error(str(error))
            status = FAILED
    return status


def _encode(client: EncoderClient | FleetClient, photo: _Photo, arguments: argparse.Namespace) -> _Encoded:
    data = photo.path.read_bytes()
    begun = time.perf_counter()
    embedding = client.encode_image(
        data, min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels, timeout_s=arguments.timeout
    )
    return _Encoded(photo, embedding, (time.perf_counter() - begun) * 1e3)


def _draw(target: Path, one: _Encoded) -> None:
    embedding = one.embedding
    photo = Image.fromarray(decode_image(one.photo.path.read_bytes()))
    photo.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    picture = draw_components(np.asarray(photo), embedding.float32(), embedding.grid, embedding.spatial_merge_size)
    picture.save(target, format="PNG")


def _report(one: _Encoded, as_json: bool) -> None:
    embedding, lane, times = one.embedding, one.embedding.lane, one.embedding.times
    if as_json:
        values = {
            "photo": printable(str(one.photo.path)),
            "name": one.photo.name,
            "key": embedding.key,
            "grid_thw": list(embedding.grid),
            "tokens": embedding.tokens,
            "width": embedding.width,
            "dtype": str(embedding.dtype),
            "round_trip_ms": round(one.round_trip_ms, 3),
            "preprocess_ms": times.preprocess_ms,
            "queue_ms": times.queue_ms,
            "run_ms": times.run_ms,
            "cached": embedding.cached,
            "runtime": lane.runtime,
            "device": lane.device,
            "precision": lane.precision,
            "fingerprint": embedding.fingerprint,
        }
        print(json.dumps(values), flush=True)
        return
    grid = "×".join(str(side) for side in embedding.grid)
    stages = f"decode {times.decode_ms:.1f}, preprocess {times.preprocess_ms:.1f}, queue {times.queue_ms:.1f}, "
    stages += f"run {times.run_ms:.1f}"
    if embedding.cached:
        stages = "from the store"
    print(
        f"{one.photo.name}: grid {grid}, {embedding.tokens} tokens × {embedding.width} {embedding.dtype}, "
        f"{one.round_trip_ms:.1f} ms ({stages}) on {lane.runtime}/{lane.device}/{lane.precision}",
        flush=True,
    )


def _report_failure(photo: _Photo, error: Exception, as_json: bool) -> None:
    if isinstance(error, OSError):
        code, message = "UNREADABLE", error.strerror or str(error)
    elif isinstance(error, EncodeError):
        code, message = error.code, error.message
        if error.retry_delay_s is not None:
            message += f" (try again in {error.retry_delay_s:g} s)"
    else:
        code, message = ("BAD_REPLY" if isinstance(error, ProtocolError) else "BAD_PHOTO"), str(error)
    print_error(f"{photo.path}: {code}: {message}")
    if as_json:
        values = {"photo": printable(str(photo.path)), "name": photo.name, "error": {"code": code, "message": message}}
        print(json.dumps(values), flush=True)


def _grid_name(photo: _Photo) -> str:
    return f"{photo.name}.grid_thw"


def _tensor(dtype: str, array: Array) -> TensorSpec:
    """Points into the array, which must outlive the writing."""
    return TensorSpec(dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
