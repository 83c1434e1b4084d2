"""What a server says of itself: Info, grpc.health.v1, and reflection for tools that have no copy of the contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from pictures import PIXELS, TOWER, encoded, picture
from servers import Server

import sidecar
from sidecar.artifact import Manifest, open_artifact
from sidecar.client import Embedding
from sidecar.items import image_item
from sidecar.pb import encoder_pb2 as pb

ENCODER = "epd.encoder.v1.Encoder"
Status = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def info(server: Server) -> pb.InfoResponse:
    with server.client() as client:
        return client.info(timeout_s=10)


@pytest.fixture(scope="module")
def manifest(toy_artifact: Path) -> Manifest:
    return open_artifact(toy_artifact).manifest


@pytest.fixture(scope="module")
def health(server: Server) -> Iterator[health_pb2_grpc.HealthStub]:
    with server.channel() as channel:
        yield health_pb2_grpc.HealthStub(channel)


def test_info_tells_which_model_this_is(info: pb.InfoResponse, manifest: Manifest) -> None:
    assert info.version == sidecar.__version__
    assert info.fingerprint == manifest.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", info.fingerprint)
    assert (info.checkpoint.source, info.checkpoint.dtype, info.checkpoint.random_weights) == ("toy", "bfloat16", True)


def test_info_tells_the_towers_and_the_pictures_numbers(info: pb.InfoResponse, manifest: Manifest) -> None:
    for field in pb.TowerSpec.DESCRIPTOR.fields:
        assert getattr(info.tower, field.name) == getattr(manifest.tower, field.name) == getattr(TOWER, field.name)
    for field in pb.PixelSpec.DESCRIPTOR.fields:
        told = getattr(info.pixels, field.name)
        told = tuple(told) if field.is_repeated else told
        assert told == getattr(manifest.pixels, field.name)
    assert (tuple(info.pixels.image_mean), tuple(info.pixels.image_std)) == (PIXELS.image_mean, PIXELS.image_std)
    assert info.pixels.rescale_factor == 1 / 255


def test_info_tells_the_limits_as_they_were_set(info: pb.InfoResponse) -> None:
    limits = pb.Limits(message_bytes=64 << 20, items=16, image_pixels=4_000_000, item_patches=16_384)
    assert info.limits == limits


def test_info_tells_the_accuracy_that_was_measured(info: pb.InfoResponse, manifest: Manifest) -> None:
    (accuracy,) = info.accuracy
    measured = manifest.variant("openvino", "f32").accuracy
    assert measured is not None
    assert (accuracy.runtime, accuracy.precision) == ("openvino", "f32")
    assert (accuracy.cosine_min, accuracy.cosine_mean) == (measured.cosine_min, measured.cosine_mean)
    assert accuracy.relative_error == measured.relative_error
    assert accuracy.cosine_min > 0.99999


def test_the_device_told_is_the_one_that_the_runtime_reports(server: Server, info: pb.InfoResponse) -> None:
    """Asked for was `cpu`; the answer, in Info, in the log and with each embedding, is OpenVINO's."""
    (lane,) = info.lanes
    assert (lane.runtime, lane.precision) == ("openvino", "f32")
    assert re.fullmatch(r"CPU \(.+, \d+ threads, f32\)", lane.device)
    log = server.log.read_text()
    assert f"lane cpu: openvino/f32 {info.fingerprint[:16]} on {lane.device}, embeddings in float32" in log
    with server.client() as client:
        (embedding,) = client.encode([image_item(encoded(picture(56, 56)))])
    assert isinstance(embedding, Embedding)
    assert (embedding.lane.device, embedding.fingerprint) == (lane.device, info.fingerprint)


@pytest.mark.parametrize("service", ["", ENCODER])
def test_health_is_serving(health: health_pb2_grpc.HealthStub, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request, timeout=10).status == Status.SERVING
    watch = health.Watch(request, timeout=10)
    assert next(watch).status == Status.SERVING
    watch.cancel()


def test_the_health_of_an_unknown_service_is_not_found(health: health_pb2_grpc.HealthStub) -> None:
    request = health_pb2.HealthCheckRequest(service="epd.encoder.v1.Decoder")
    with pytest.raises(grpc.RpcError) as raised:
        health.Check(request, timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert ENCODER in str(raised.value.details())
    watch = health.Watch(request, timeout=10)
    assert next(watch).status == Status.SERVICE_UNKNOWN  # the stream goes on, as the protocol has it
    watch.cancel()


def test_reflection_describes_the_contract(server: Server) -> None:
    with server.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {ENCODER, "grpc.health.v1.Health"}
        service = DescriptorPool(database).FindServiceByName(ENCODER)
        assert {method.name for method in service.methods} >= {"Info", "Encode"}
        encode = service.methods_by_name["Encode"]
        assert encode.server_streaming and not encode.client_streaming
        item = encode.input_type.fields_by_name["items"].message_type
        assert item is not None
        ours = pb.Item.DESCRIPTOR
        assert [(field.name, field.number) for field in item.fields] == [(f.name, f.number) for f in ours.fields]
        error = encode.output_type.fields_by_name["error"].message_type
        assert error is not None and error.full_name == "google.rpc.Status"  # of another file, which is described too
