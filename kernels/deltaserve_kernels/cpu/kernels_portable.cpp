// The kernels for any processor; see tables.inc and kernels.inc.

#include "tables.inc"

namespace deltaserve::portable {
#define DS_ISA 0
#include "kernels.inc"
}  // namespace deltaserve::portable
