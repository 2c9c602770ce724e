"""The operator of deformable attention: its Python face, its schemas, and a reference out of table look-ups."""

from pipeline.model.ops.sampling import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
