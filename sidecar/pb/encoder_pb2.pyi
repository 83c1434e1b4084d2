from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]

class Delivery(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INLINE: _ClassVar[Delivery]
    STORED: _ClassVar[Delivery]
DTYPE_UNSPECIFIED: DType
UINT8: DType
FLOAT32: DType
FLOAT16: DType
BFLOAT16: DType
INLINE: Delivery
STORED: Delivery

class Grid(_message.Message):
    __slots__ = ("t", "h", "w")
    T_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    t: int
    h: int
    w: int
    def __init__(self, t: _Optional[int] = ..., h: _Optional[int] = ..., w: _Optional[int] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("items", "delivery")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    delivery: Delivery
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., delivery: _Optional[_Union[Delivery, str]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("keys", "delivery")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    delivery: Delivery
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., delivery: _Optional[_Union[Delivery, str]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, leases: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("key", "image", "rgb_image", "rgb_video", "patches", "url", "min_pixels", "max_pixels")
    KEY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    RGB_IMAGE_FIELD_NUMBER: _ClassVar[int]
    RGB_VIDEO_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    key: str
    image: bytes
    rgb_image: RgbImage
    rgb_video: RgbVideo
    patches: Patches
    url: str
    min_pixels: int
    max_pixels: int
    def __init__(self, key: _Optional[str] = ..., image: _Optional[bytes] = ..., rgb_image: _Optional[_Union[RgbImage, _Mapping]] = ..., rgb_video: _Optional[_Union[RgbVideo, _Mapping]] = ..., patches: _Optional[_Union[Patches, _Mapping]] = ..., url: _Optional[str] = ..., min_pixels: _Optional[int] = ..., max_pixels: _Optional[int] = ...) -> None: ...

class RgbImage(_message.Message):
    __slots__ = ("height", "width", "data")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    data: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class RgbVideo(_message.Message):
    __slots__ = ("frames", "height", "width", "data")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    frames: int
    height: int
    width: int
    data: bytes
    def __init__(self, frames: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Patches(_message.Message):
    __slots__ = ("grid", "dtype", "data", "scale", "single_slice")
    class Scale(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SCALE_UNSPECIFIED: _ClassVar[Patches.Scale]
        PIXELS: _ClassVar[Patches.Scale]
        NORMALISED: _ClassVar[Patches.Scale]
    SCALE_UNSPECIFIED: Patches.Scale
    PIXELS: Patches.Scale
    NORMALISED: Patches.Scale
    GRID_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SINGLE_SLICE_FIELD_NUMBER: _ClassVar[int]
    grid: Grid
    dtype: DType
    data: bytes
    scale: Patches.Scale
    single_slice: bool
    def __init__(self, grid: _Optional[_Union[Grid, _Mapping]] = ..., dtype: _Optional[_Union[DType, str]] = ..., data: _Optional[bytes] = ..., scale: _Optional[_Union[Patches.Scale, str]] = ..., single_slice: bool = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("index", "embedding", "chunk", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    embedding: Embedding
    chunk: Chunk
    error: _status_pb2.Status
    def __init__(self, index: _Optional[int] = ..., embedding: _Optional[_Union[Embedding, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("key", "grid", "tokens", "width", "dtype", "size_bytes", "fingerprint", "lane", "times", "file", "cached", "coalesced")
    KEY_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    key: str
    grid: Grid
    tokens: int
    width: int
    dtype: DType
    size_bytes: int
    fingerprint: str
    lane: Lane
    times: StageTimes
    file: File
    cached: bool
    coalesced: bool
    def __init__(self, key: _Optional[str] = ..., grid: _Optional[_Union[Grid, _Mapping]] = ..., tokens: _Optional[int] = ..., width: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., size_bytes: _Optional[int] = ..., fingerprint: _Optional[str] = ..., lane: _Optional[_Union[Lane, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., file: _Optional[_Union[File, _Mapping]] = ..., cached: bool = ..., coalesced: bool = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path", "name", "lease", "lease_seconds")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    path: str
    name: str
    lease: str
    lease_seconds: float
    def __init__(self, path: _Optional[str] = ..., name: _Optional[str] = ..., lease: _Optional[str] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Lane(_message.Message):
    __slots__ = ("runtime", "device", "precision")
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    runtime: str
    device: str
    precision: str
    def __init__(self, runtime: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ...) -> None: ...

class StageTimes(_message.Message):
    __slots__ = ("preprocess_ms", "queue_ms", "run_ms", "decode_ms", "publish_ms")
    PREPROCESS_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    RUN_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_MS_FIELD_NUMBER: _ClassVar[int]
    preprocess_ms: float
    queue_ms: float
    run_ms: float
    decode_ms: float
    publish_ms: float
    def __init__(self, preprocess_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., run_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., publish_ms: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("version", "fingerprint", "checkpoint", "tower", "pixels", "embedding_dtype", "lanes", "limits", "accuracy", "store")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    TOWER_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    version: str
    fingerprint: str
    checkpoint: Checkpoint
    tower: TowerSpec
    pixels: PixelSpec
    embedding_dtype: DType
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    limits: Limits
    accuracy: _containers.RepeatedCompositeFieldContainer[Accuracy]
    store: Store
    def __init__(self, version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., tower: _Optional[_Union[TowerSpec, _Mapping]] = ..., pixels: _Optional[_Union[PixelSpec, _Mapping]] = ..., embedding_dtype: _Optional[_Union[DType, str]] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., accuracy: _Optional[_Iterable[_Union[Accuracy, _Mapping]]] = ..., store: _Optional[_Union[Store, _Mapping]] = ...) -> None: ...

class Store(_message.Message):
    __slots__ = ("directory", "capacity_bytes", "lease_seconds")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    capacity_bytes: int
    lease_seconds: float
    def __init__(self, directory: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("source", "dtype", "random_weights")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANDOM_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    source: str
    dtype: str
    random_weights: bool
    def __init__(self, source: _Optional[str] = ..., dtype: _Optional[str] = ..., random_weights: bool = ...) -> None: ...

class TowerSpec(_message.Message):
    __slots__ = ("depth", "hidden_size", "out_hidden_size", "patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    OUT_HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TEMPORAL_PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPATIAL_MERGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    IN_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    depth: int
    hidden_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    def __init__(self, depth: _Optional[int] = ..., hidden_size: _Optional[int] = ..., out_hidden_size: _Optional[int] = ..., patch_size: _Optional[int] = ..., temporal_patch_size: _Optional[int] = ..., spatial_merge_size: _Optional[int] = ..., in_channels: _Optional[int] = ...) -> None: ...

class PixelSpec(_message.Message):
    __slots__ = ("image_mean", "image_std", "rescale_factor", "min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
    IMAGE_MEAN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_STD_FIELD_NUMBER: _ClassVar[int]
    RESCALE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    VIDEO_MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    VIDEO_MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    image_mean: _containers.RepeatedScalarFieldContainer[float]
    image_std: _containers.RepeatedScalarFieldContainer[float]
    rescale_factor: float
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    def __init__(self, image_mean: _Optional[_Iterable[float]] = ..., image_std: _Optional[_Iterable[float]] = ..., rescale_factor: _Optional[float] = ..., min_pixels: _Optional[int] = ..., max_pixels: _Optional[int] = ..., video_min_pixels: _Optional[int] = ..., video_max_pixels: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes", "items", "image_pixels", "item_patches", "urls")
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    ITEM_PATCHES_FIELD_NUMBER: _ClassVar[int]
    URLS_FIELD_NUMBER: _ClassVar[int]
    message_bytes: int
    items: int
    image_pixels: int
    item_patches: int
    urls: bool
    def __init__(self, message_bytes: _Optional[int] = ..., items: _Optional[int] = ..., image_pixels: _Optional[int] = ..., item_patches: _Optional[int] = ..., urls: bool = ...) -> None: ...

class Accuracy(_message.Message):
    __slots__ = ("runtime", "precision", "cosine_min", "cosine_mean", "relative_error")
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    COSINE_MIN_FIELD_NUMBER: _ClassVar[int]
    COSINE_MEAN_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    runtime: str
    precision: str
    cosine_min: float
    cosine_mean: float
    relative_error: float
    def __init__(self, runtime: _Optional[str] = ..., precision: _Optional[str] = ..., cosine_min: _Optional[float] = ..., cosine_mean: _Optional[float] = ..., relative_error: _Optional[float] = ...) -> None: ...
