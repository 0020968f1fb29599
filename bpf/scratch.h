/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * This CPU's scratch: where capture.c and intercept.c take a packet apart (parse.h).
 */
#ifndef PYCOPY_SCRATCH_H
#define PYCOPY_SCRATCH_H

#include "maps.h"
#include "parse.h"

static __always_inline struct pycopy_scratch *pycopy_scratch(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_SCRATCH, &zero);
}

#endif
