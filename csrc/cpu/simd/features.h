// Whether this build has the x86-64 levels in addition to the portable one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define EMBKERN_X86_LEVELS 1
#endif
