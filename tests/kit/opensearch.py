"""OpenSearch, the real one, one node on a free port of the loopback address, in a directory that goes when it stops."""

from tests.kit.install import OPENSEARCH_HOME
from tests.kit.java_server import JavaServer
from tests.kit.ports import free_ports

FLAGS = ["-Xms256m", "-XX:+UseSerialGC", "--enable-native-access=ALL-UNNAMED"]


class OpenSearchServer(JavaServer):
    def __init__(self) -> None:
        http, transport = free_ports(2)
        self.url = f"http://127.0.0.1:{http}"
        ready_url = f"{self.url}/_cluster/health?wait_for_status=yellow&timeout=1s"
        super().__init__("OpenSearch", OPENSEARCH_HOME / "cls" / "Node.class", ready_url)
        path = f"{OPENSEARCH_HOME / 'lib'}/*:{OPENSEARCH_HOME / 'cls'}"
        self.run([*FLAGS, "-cp", path, "Node", self.home.name, str(http), str(transport)])
