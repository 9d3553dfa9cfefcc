#!/usr/bin/env python3
"""A service in Python, made from nothing but CNSMO's .proto files.

It announces itself to the catalogue, prints what it sees there, and answers requests to its subject with what they carry.
One line of JSON on standard output for each thing that happens.
"""

import argparse
import json
import pathlib
import queue
import signal
import sys
import threading
import uuid

import grpc

HERE = pathlib.Path(__file__).resolve().parent
TTL_SECONDS = 3
# Of messages that may be on their way to us; each one answered makes room for the next.
CREDIT = 64


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--socket", type=pathlib.Path, help="the core's unix socket")
    way.add_argument("--core", metavar="HOST:PORT", help="the core's TLS address; needs --identity")
    parser.add_argument(
        "--identity",
        type=pathlib.Path,
        metavar="DIR",
        help="folder with ca.crt, identity.crt and identity.key of a service identity",
    )
    parser.add_argument("--service", default="echo", help="the service that this is an instance of")
    parser.add_argument("--name", default="echo-1", help="name of this instance")
    parser.add_argument(
        "--proto",
        type=pathlib.Path,
        default=HERE.parent.parent / "cnsmo-proto" / "proto",
        help="folder of the .proto files",
    )
    parsed = parser.parse_args()
    if parsed.core and not parsed.identity:
        parser.error("--core needs --identity")
    return parsed


def connect(args):
    options = [("grpc.keepalive_time_ms", 10_000), ("grpc.default_authority", "core.cnsmo")]
    if args.socket:
        return grpc.insecure_channel(f"unix:{args.socket.resolve()}", options=options)
    read = lambda name: (args.identity / name).read_bytes()
    credentials = grpc.ssl_channel_credentials(
        read("ca.crt"), read("identity.key"), read("identity.crt")
    )
    # The core's certificate has this name, whatever its address.
    options.append(("grpc.ssl_target_name_override", "core.cnsmo"))
    return grpc.secure_channel(args.core, credentials, options=options)


def tell(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


class Announcer:
    """Announces the instance at each change, and three times within each TTL."""

    def __init__(self, args, channel, catalog, services):
        self.catalog = catalog
        self.stub = services.CatalogServiceStub(channel)
        self.instance = catalog.Instance(
            service=args.service,
            name=args.name,
            incarnation=uuid.uuid4().hex,
            attributes={"language": "python"},
            endpoints=[catalog.Endpoint(protocol="bus", address=f"svc.{args.service}")],
        )
        self.stopped = threading.Event()

    def enter(self, phase, reason):
        self.instance.phase = phase
        self.instance.reason = reason
        self.announce()

    def announce(self):
        request = self.catalog.AnnounceRequest(instance=self.instance)
        request.ttl.seconds = TTL_SECONDS
        answer = self.stub.Announce(request, timeout=TTL_SECONDS, wait_for_ready=True)
        return answer.instance

    def run(self):
        while not self.stopped.wait(TTL_SECONDS / 3):
            try:
                self.announce()
            except grpc.RpcError as error:
                # The next one says the same.
                tell("not-announced", code=error.code().name)

    def withdraw(self):
        self.stopped.set()
        request = self.catalog.WithdrawRequest(
            service=self.instance.service, name=self.instance.name
        )
        self.stub.Withdraw(request, timeout=2)


def watch(channel, catalog, services):
    """Tells of each instance, and of each change, until the channel is closed."""
    stub = services.CatalogServiceStub(channel)
    try:
        for message in stub.WatchInstances(catalog.WatchInstancesRequest(), wait_for_ready=True):
            tell(
                "instance",
                kind=catalog.WatchInstancesResponse.Event.Name(message.event),
                service=message.instance.service,
                name=message.instance.name,
                phase=catalog.Phase.Name(message.instance.phase),
            )
    except grpc.RpcError as error:
        tell("watch-ended", code=error.code().name)


def serve(args, channel, bus, services, ready):
    """Answers requests to `svc.<service>` as a member of the queue group of that name."""
    subject = f"svc.{args.service}"
    outgoing = queue.Queue()
    outgoing.put(
        bus.SubscribeRequest(
            subscription=bus.Subscription(subject=subject, queue_group=subject, member=args.name)
        )
    )
    outgoing.put(bus.SubscribeRequest(credit=bus.Credit(messages=CREDIT)))
    stream = services.BusServiceStub(channel).Subscribe(iter(outgoing.get, None))
    try:
        for message in stream:
            kind = message.WhichOneof("message")
            if kind == "subscribed":
                ready()
            elif kind == "delivery":
                delivery = message.delivery
                tell("delivery", subject=delivery.message.subject)
                if delivery.reply_id:
                    reply = bus.Reply(
                        reply_id=delivery.reply_id,
                        payload=delivery.message.payload,
                        content_type=delivery.message.content_type,
                    )
                    outgoing.put(bus.SubscribeRequest(reply=reply))
                outgoing.put(bus.SubscribeRequest(credit=bus.Credit(messages=1)))
            elif kind == "lagged":
                tell("lagged", skipped=message.lagged.skipped)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.CANCELLED:
            tell("bus-ended", code=error.code().name, details=error.details())
            raise


def main():
    args = arguments()
    # The compiler of grpcio-tools finds .proto files where Python finds modules.
    sys.path.insert(0, str(args.proto))
    catalog, catalog_services = grpc.protos_and_services("cnsmo/catalog/v1/catalog.proto")
    bus, bus_services = grpc.protos_and_services("cnsmo/bus/v1/bus.proto")

    channel = connect(args)
    announcer = Announcer(args, channel, catalog, catalog_services)
    announcer.enter(catalog.PHASE_STARTING, "Spawned")
    tell("announced", phase="starting")
    threading.Thread(target=announcer.run, daemon=True).start()
    threading.Thread(
        target=watch, args=(channel, catalog, catalog_services), daemon=True
    ).start()

    def ready():
        announcer.enter(catalog.PHASE_READY, "Healthy")
        tell("announced", phase="ready")

    def stop(*_):
        announcer.withdraw()
        channel.close()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    serve(args, channel, bus, bus_services, ready)


if __name__ == "__main__":
    main()
