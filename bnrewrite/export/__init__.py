"""Export of the eval graph to ONNX, from the user's module to a verified file.

    arguments   the user's arguments, checked before any work starts
    paths       where the file goes, checked likewise
    untouched   what the model holds, restored after its forward ran or was traced
    evaluate    what the user's model computes in eval mode
    plain       a reverted copy that shares the parameters
    trace       the copy -> an ``ExportedProgram`` whose BatchNorm calls are checked
    translate   the program -> ONNX of the requested opset
    names       parameters, inputs, outputs and axes get their familiar names
    cleanup     removes what the exporter added to the graph
    fold        BatchNorm into the convolution or linear layer before it, on request
    verify      checker and onnxruntime against the user's model
    files       the file appears once everything has passed

Importing this package imports neither onnx nor onnxscript; exporting does.
"""
