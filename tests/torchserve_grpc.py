"""Clients of TorchServe's gRPC: its messages in wire format, without a .proto compiler."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Tuple

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Field = descriptor_pb2.FieldDescriptorProto
KINDS = {
    "string": Field.TYPE_STRING,
    "bytes": Field.TYPE_BYTES,
    "int64": Field.TYPE_INT64,
    "float": Field.TYPE_FLOAT,
    "bool": Field.TYPE_BOOL,
}

# Each message's fields as (number, name, kind); a kind in brackets is repeated, and one that is not scalar is a
# message.
INFERENCE = "org.pytorch.serve.grpc.inference"
OPEN_INFERENCE = "org.pytorch.serve.grpc.openinference"
MESSAGES: Dict[str, Dict[str, List[Tuple[int, str, str]]]] = {
    INFERENCE: {
        "PredictionsRequest": [
            (1, "model_name", "string"),
            (2, "model_version", "string"),
            (3, "input", "[InputEntry]"),
            (4, "sequence_id", "string"),
        ],
        "InputEntry": [(1, "key", "string"), (2, "value", "bytes")],  # a map is a list of entries
        "PredictionResponse": [(1, "prediction", "bytes")],
        "TorchServeHealthResponse": [(1, "health", "string")],
        "Empty": [],
    },
    OPEN_INFERENCE: {
        "Contents": [(6, "fp32_contents", "[float]"), (8, "bytes_contents", "[bytes]")],
        "Tensor": [
            (1, "name", "string"),
            (2, "datatype", "string"),
            (3, "shape", "[int64]"),
            (5, "contents", "Contents"),
        ],
        "ModelInferRequest": [
            (1, "model_name", "string"),
            (2, "model_version", "string"),
            (3, "id", "string"),
            (5, "inputs", "[Tensor]"),
            (7, "raw_input_contents", "[bytes]"),
        ],
        "ModelInferResponse": [
            (1, "model_name", "string"),
            (2, "model_version", "string"),
            (3, "id", "string"),
            (5, "outputs", "[Tensor]"),
        ],
    },
}


def _classes() -> Dict[str, Any]:
    """Return each message's class, by name."""
    pool = descriptor_pool.DescriptorPool()
    for package, messages in MESSAGES.items():
        file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        for name, fields in messages.items():
            message = file.message_type.add(name=name)
            for number, field, kind in fields:
                label = Field.LABEL_REPEATED if kind[0] == "[" else Field.LABEL_OPTIONAL
                kind = kind.strip("[]")
                own = {"type": KINDS[kind]} if kind in KINDS else {"type_name": f".{package}.{kind}"}
                message.field.add(name=field, number=number, label=label, **own)
        pool.Add(file)
    names = {name: f"{package}.{name}" for package, messages in MESSAGES.items() for name in messages}
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(full)) for name, full in names.items()}


CLASSES = _classes()


class Client:
    """The calls of a server; each raises grpc.RpcError."""

    def __init__(self, port: int, key: str = "") -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.metadata = [("authorization", f"Bearer {key}")] if key else []

    def close(self) -> None:
        self.channel.close()

    def ping(self) -> str:
        call = self._call("unary_unary", f"{INFERENCE}.InferenceAPIsService/Ping", "TorchServeHealthResponse")
        return str(call(CLASSES["Empty"](), metadata=self.metadata, timeout=30).health)

    def predictions(self, model: str, parts: Mapping[str, bytes], timeout: float = 60) -> bytes:
        call = self._call("unary_unary", f"{INFERENCE}.InferenceAPIsService/Predictions", "PredictionResponse")
        return bytes(call(self._request(model, parts), metadata=self.metadata, timeout=timeout).prediction)

    def stream_predictions(self, model: str, parts: Mapping[str, bytes], timeout: float = 60) -> List[bytes]:
        call = self._call("unary_stream", f"{INFERENCE}.InferenceAPIsService/StreamPredictions", "PredictionResponse")
        return [
            bytes(piece.prediction)
            for piece in call(self._request(model, parts), metadata=self.metadata, timeout=timeout)
        ]

    def stream_predictions_2(self, model: str, parts: Mapping[str, bytes], sequence: str) -> List[bytes]:
        call = self._call("stream_stream", f"{INFERENCE}.InferenceAPIsService/StreamPredictions2", "PredictionResponse")
        request = self._request(model, parts)
        request.sequence_id = sequence
        return [bytes(piece.prediction) for piece in call(iter([request]), metadata=self.metadata, timeout=60)]

    def model_infer(self, model: str, tensors: Iterable[Mapping[str, Any]], **fields: Any) -> Any:
        call = self._call("unary_unary", f"{OPEN_INFERENCE}.GRPCInferenceService/ModelInfer", "ModelInferResponse")
        return call(
            CLASSES["ModelInferRequest"](model_name=model, inputs=list(tensors), **fields),
            metadata=self.metadata,
            timeout=60,
        )

    def _call(self, kind: str, path: str, answer: str) -> Any:
        return getattr(self.channel, kind)(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=CLASSES[answer].FromString,
        )

    def _request(self, model: str, parts: Mapping[str, bytes]) -> Any:
        entries = [{"key": key, "value": value} for key, value in parts.items()]
        return CLASSES["PredictionsRequest"](model_name=model, input=entries)
