"""What TensorRT's parser takes of ONNX, by its published table.

docs/operators.md of onnx/onnx-tensorrt for TensorRT 10.15: the operators marked as supported, and
the restrictions that a file can be checked for. Only the table is checked here; nothing was run.
"""
from __future__ import annotations

from typing import Any

OPSETS = range(9, 25)

OPERATORS = {
    'Abs', 'Acos', 'Acosh', 'Add', 'And', 'ArgMax', 'ArgMin', 'Asin', 'Asinh', 'Atan', 'Atanh',
    'Attention', 'AveragePool', 'BatchNormalization', 'BlackmanWindow', 'Cast', 'CastLike',
    'Ceil', 'Celu', 'Clip', 'Concat', 'Constant', 'ConstantOfShape', 'Conv', 'ConvTranspose',
    'Cos', 'Cosh', 'CumSum', 'DeformConv', 'DepthToSpace', 'DequantizeLinear', 'Div', 'Dropout',
    'Einsum', 'Elu', 'Equal', 'Erf', 'Exp', 'Expand', 'EyeLike', 'Flatten', 'Floor', 'Gather',
    'GatherElements', 'GatherND', 'Gelu', 'Gemm', 'GlobalAveragePool', 'GlobalLpPool',
    'GlobalMaxPool', 'Greater', 'GreaterOrEqual', 'GridSample', 'GroupNormalization', 'GRU',
    'HammingWindow', 'HannWindow', 'HardSigmoid', 'HardSwish', 'Hardmax', 'Identity', 'If',
    'ImageScaler', 'InstanceNormalization', 'IsInf', 'IsNaN', 'LayerNormalization', 'LeakyRelu',
    'Less', 'LessOrEqual', 'Log', 'LogSoftmax', 'Loop', 'LRN', 'LSTM', 'LpNormalization',
    'LpPool', 'MatMul', 'Max', 'MaxPool', 'Mean', 'MeanVarianceNormalization', 'Min', 'Mish',
    'Mod', 'Mul', 'Neg', 'NonMaxSuppression', 'NonZero', 'Not', 'OneHot', 'Or', 'Pad',
    'ParametricSoftplus', 'Pow', 'PRelu', 'QuantizeLinear', 'RandomNormal', 'RandomNormalLike',
    'RandomUniform', 'RandomUniformLike', 'Range', 'Reciprocal', 'ReduceL1', 'ReduceL2',
    'ReduceLogSum', 'ReduceLogSumExp', 'ReduceMax', 'ReduceMean', 'ReduceMin', 'ReduceProd',
    'ReduceSum', 'ReduceSumSquare', 'Relu', 'Reshape', 'Resize', 'ReverseSequence',
    'RMSNormalization', 'RNN', 'RoiAlign', 'RotaryEmbedding', 'Round', 'STFT', 'ScaledTanh',
    'Scan', 'Scatter', 'ScatterElements', 'ScatterND', 'Selu', 'Shape', 'Shrink', 'Sigmoid',
    'Sign', 'Sin', 'Sinh', 'Size', 'Slice', 'Softmax', 'Softplus', 'Softsign', 'SpaceToDepth',
    'Split', 'Sqrt', 'Squeeze', 'Sub', 'Sum', 'Tan', 'Tanh', 'TensorScatter', 'ThresholdedRelu',
    'Tile', 'TopK', 'Transpose', 'Trilu', 'Unsqueeze', 'Upsample', 'Where', 'Xor'}

MAX_TOP_K = 3840
RESIZE_COORDINATES = {'half_pixel', 'pytorch_half_pixel', 'tf_half_pixel_for_nn', 'asymmetric',
                      'align_corners'}
RESIZE_MODES = {'nearest', 'linear'}
# A computed kernel must have a static shape, and our own rule: control flow is not needed.
CONTROL_FLOW = {'If', 'Loop', 'Scan'}


def find_violations(model: Any) -> list[str]:
    """Sentences about what of an ``onnx.ModelProto`` the table, or our own rules, do not allow."""
    import onnx
    from onnx import numpy_helper
    found = []
    for opset in model.opset_import:
        if opset.domain not in ('', 'ai.onnx'):
            found.append(f'operators of the domain {opset.domain}')
        elif opset.version not in OPSETS:
            found.append(f'opset {opset.version}')
    if model.functions:
        found.append(f'functions: {[function.name for function in model.functions]}')
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants.update((node.output[0], attribute.t) for node in model.graph.node
                     if node.op_type == 'Constant' for attribute in node.attribute
                     if attribute.name == 'value')
    shapes = {value.name: value.type.tensor_type.shape for value in
              onnx.shape_inference.infer_shapes(model).graph.value_info}
    for node in model.graph.node:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute)
                  for attribute in node.attribute}
        label = f'{node.op_type} {node.name}'
        if node.op_type not in OPERATORS or node.domain not in ('', 'ai.onnx'):
            found.append(f'{node.domain or "ai.onnx"}.{node.op_type}')
        elif node.op_type in CONTROL_FLOW:
            found.append(label)
        elif node.op_type == 'Conv' and node.input[1] not in constants:
            dims = shapes.get(node.input[1])
            if dims is None or any(not dim.dim_value for dim in dims.dim):
                found.append(f'{label}: a computed kernel without a static shape')
        elif node.op_type == 'TopK':
            k = constants.get(node.input[1])
            if k is None or numpy_helper.to_array(k).item() >= MAX_TOP_K or not values.get(
                    'sorted', 1):
                found.append(f'{label}: K must be a constant below {MAX_TOP_K}, and sorted')
        elif (node.op_type == 'Resize' and (
                values.get('mode', b'nearest').decode() not in RESIZE_MODES
                or values.get('coordinate_transformation_mode', b'half_pixel').decode()
                not in RESIZE_COORDINATES or values.get('antialias'))
              or node.op_type == 'ScatterND' and values.get('reduction', b'none') != b'none'):
            found.append(f'{label}: {values}')
        elif node.op_type.startswith('Reduce') and len(node.input) > 1 and (
                node.input[1] and node.input[1] not in constants):
            found.append(f'{label}: axes must be constants')
        elif node.op_type == 'GridSample' and len(shapes.get(node.output[0], _FOUR).dim) != 4:
            found.append(f'{label}: the input must be 4-d')
    return sorted(set(found))


class _FOUR:
    dim = range(4)
