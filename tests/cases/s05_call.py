"""Makes gRPC calls with the implementations of gRPC and of canonical JSON that Google keeps, from the .proto files alone.

usage: s05_call.py PROTO-FOLDER {SOCKET | HOST:PORT IDENTITY-FOLDER}

Reads lines of JSON, [file, service, method, request], and answers each with one line: the message, or code and message. Of a
stream all messages, in one line.
Each request carries a field more than the core knows.
"""

import json
import pathlib
import sys

import grpc
from google.protobuf import json_format

# Field 2,047 with the varint 1.
UNKNOWN_FIELD = bytes([0xF8, 0x7F, 0x01])


def connect(where, *identity):
    if not identity:
        return grpc.insecure_channel(f"unix:{where}", [("grpc.default_authority", "core.cnsmo")])
    folder = pathlib.Path(identity[0])
    ca, key, certificate = (
        (folder / name).read_bytes() for name in ("ca.crt", "identity.key", "identity.crt")
    )
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    name = [("grpc.ssl_target_name_override", "core.cnsmo")]
    return grpc.secure_channel(where, credentials, name)


def call(channel, file, service, method, request):
    messages, _ = grpc.protos_and_services(file)
    descriptor = messages.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    is_stream = descriptor.server_streaming
    make = channel.unary_stream if is_stream else channel.unary_unary
    message = getattr(messages, descriptor.input_type.name)()
    json_format.ParseDict(request, message)
    made = make(
        f"/{messages.DESCRIPTOR.package}.{service}/{method}",
        request_serializer=lambda message: message.SerializeToString() + UNKNOWN_FIELD,
        response_deserializer=getattr(messages, descriptor.output_type.name).FromString,
    )
    try:
        answer = made(message, timeout=30, wait_for_ready=True)
        if is_stream:
            return [json_format.MessageToDict(one) for one in answer]
        return json_format.MessageToDict(answer)
    except grpc.RpcError as error:
        return {"code": error.code().name, "message": error.details()}


def main():
    proto, *where = sys.argv[1:]
    sys.path.insert(0, proto)
    with connect(*where) as channel:
        for line in sys.stdin:
            print(json.dumps(call(channel, *json.loads(line))), flush=True)


main()
