"""A Flower grid whose clients are called in this process, so that a test can spoil what they send."""

import uuid
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 1000


class CalledGrid(Grid):
    """Args: the app of all clients; their budgets; ``spoil(round, client, reply)``, a reply or None for silence."""

    def __init__(self, app: ClientApp, budgets: list[int], spoil: Callable = lambda turn, client, reply: reply):
        self.app, self.budgets, self.spoil = app, budgets, spoil
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as Flower's runtimes do
        self.connected = range(FIRST_NODE, FIRST_NODE + len(budgets))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = [self.answer(message) for message in messages]
        return [reply for reply in replies if reply is not None]

    def answer(self, message: Message) -> Message | None:
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        node = message.metadata.dst_node_id
        client = node - FIRST_NODE
        config = {"partition-id": client, "num-partitions": len(self.budgets), "budget": self.budgets[client]}
        context = Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(code=0, reason=str(error)), reply_to=message)
        return self.spoil(message.content.config_records["config"]["server-round"], client, reply)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.connected)

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError
