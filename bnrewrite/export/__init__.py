"""Export of the eval graph to ONNX, from the user's module to a verified file.

    arguments   what the user gave, checked before any work starts
    paths       where the file goes, likewise
    untouched   what the model holds, put back after its forward ran or was traced
    evaluate    what the user's model computes in eval mode
    plain       a reverted copy that shares the parameters
    trace       the copy -> an ``ExportedProgram`` whose BatchNorm calls are checked
    translate   the program -> ONNX of the opset that was asked for
    names       parameters, inputs, outputs and axes get the names that people know
    cleanup     the graph without what the exporter invented
    fold        BatchNorm into the convolution or linear layer before it, on request
    verify      checker and onnxruntime against the user's model
    files       the file appears when everything passed

Importing this package imports neither onnx nor onnxscript; exporting does.
"""
