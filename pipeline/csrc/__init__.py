"""C++ and CUDA sources of MSDeformAttn and the one way to build them: `python -m pipeline.csrc.build`."""
