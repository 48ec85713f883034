import pytest

from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.nats_server import NatsServer
from kvbm_jax.transports.nats_wire import NatsStream, Subjects


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def place(server, request):
    """Fields of configurations that share a stream and a prefix of their own."""
    name = f"T{abs(hash(request.node.nodeid))}"
    return {
        "connection": NatsConnection.from_url(server.url),
        "stream": NatsStream(name=name),
        "subjects": Subjects(name),
    }
