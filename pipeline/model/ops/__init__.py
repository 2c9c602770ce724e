"""The operator of deformable attention: its Python functions, its schemas, and a form for exports."""

from pipeline.model.ops.sampling import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
