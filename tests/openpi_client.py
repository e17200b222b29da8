"""What openpi's own client does (openpi_client: msgpack_numpy.py and websocket_client_policy.py)."""

import functools

import msgpack
import numpy as np
import websockets.sync.client


def pack_array(obj):
    if isinstance(obj, np.ndarray | np.generic) and obj.dtype.kind in ("V", "O", "c"):
        raise ValueError(f"Unsupported dtype: {obj.dtype}")
    if isinstance(obj, np.ndarray):
        return {
            b"__ndarray__": True, b"data": obj.tobytes(), b"dtype": obj.dtype.str, b"shape": obj.shape,
        }  # fmt: skip
    if isinstance(obj, np.generic):
        return {b"__npgeneric__": True, b"data": obj.item(), b"dtype": obj.dtype.str}
    return obj


def unpack_array(obj):
    if b"__ndarray__" in obj:
        return np.ndarray(buffer=obj[b"data"], dtype=np.dtype(obj[b"dtype"]), shape=obj[b"shape"])
    if b"__npgeneric__" in obj:
        return np.dtype(obj[b"dtype"]).type(obj[b"data"])
    return obj


packb = functools.partial(msgpack.packb, default=pack_array)
unpackb = functools.partial(msgpack.unpackb, object_hook=unpack_array)


class WebsocketClientPolicy:
    """Connects, reads the metadata, then sends an observation and reads an answer at a time."""

    def __init__(self, uri, api_key=None):
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self.socket = websockets.sync.client.connect(
            uri, compression=None, max_size=None, additional_headers=headers, legacy=True
        )
        self.metadata = unpackb(self.socket.recv())

    def infer(self, observation):
        self.socket.send(packb(observation))
        response = self.socket.recv()
        if isinstance(response, str):
            raise RuntimeError(f"Error in inference server:\n{response}")
        return unpackb(response)
