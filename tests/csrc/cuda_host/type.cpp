// The kernels of one type: compiled once per type, with -DMSDA_TYPE=...

#include "cases.h"

#define MSDA_VALUE_float32 float
#define MSDA_VALUE_float64 double
#define MSDA_VALUE_bfloat16 __nv_bfloat16
#define MSDA_VALUE_float16 __half
#define MSDA_PASTE(a, b) a##b
#define MSDA_NAME(prefix, type) MSDA_PASTE(prefix, type)

using Value = MSDA_NAME(MSDA_VALUE_, MSDA_TYPE);
using Real = std::conditional_t<std::is_same_v<Value, double>, double, float>;

void MSDA_NAME(run_, MSDA_TYPE)(const Case& c, Streams& io) { run_case<Value, Real>(c, io); }
