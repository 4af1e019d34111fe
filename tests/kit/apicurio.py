"""Apicurio Registry, the real one, in memory: another registry with Confluent's API, to compare answers with."""

from tests.kit.install import APICURIO_HOME
from tests.kit.java_server import JavaServer
from tests.kit.ports import free_ports
from tests.kit.registry import RestClient


class Apicurio(JavaServer, RestClient):
    def __init__(self) -> None:
        http, management = free_ports(2)
        RestClient.__init__(self, f"http://127.0.0.1:{http}/apis/ccompat/v7")
        program = APICURIO_HOME / "quarkus-run.jar"
        JavaServer.__init__(self, "Apicurio", program, f"{self.url}/subjects")
        environment = {
            "QUARKUS_HTTP_HOST": "127.0.0.1", "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
            "QUARKUS_HTTP_PORT": str(http), "QUARKUS_MANAGEMENT_PORT": str(management),
        }  # fmt: skip
        self.run(["-jar", str(program)], environment)
