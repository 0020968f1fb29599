/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * What capture.c, intercept.c and progress.c write alike: records for user space, and what
 * became of each packet.
 */
#ifndef PYCOPY_RECORD_H
#define PYCOPY_RECORD_H

#include "maps.h"

/* Counter `index` of the program's own (map "counts"). */
static __always_inline void pycopy_count(u32 index, u64 times)
{
	u64 *value = pycopy_lookup(PYCOPY_MAP_COUNTS, &index);

	if (value)
		*value += times;
}

/* Gives a record to user space; non-zero: there is no room for it. */
static __always_inline long pycopy_submit(PYCOPY_CTX *ctx, void *record, u64 bytes)
{
	if (PYCOPY_CONSTANT(PERF))
		return pycopy_perf_output(ctx, PYCOPY_MAP(PYCOPY_MAP_SEGMENTS), PYCOPY_CURRENT_CPU,
					  record, bytes);
	return pycopy_ring_output(PYCOPY_MAP(PYCOPY_MAP_SEGMENTS), record, bytes, 0);
}

/* A response's record, or TOO_BIG: counted as `done`, or that there was no room for it. */
static __always_inline void pycopy_record_response(PYCOPY_CTX *ctx, struct pycopy_segment *segment,
						   u32 done)
{
	segment->time_ns = bpf_ktime_get_ns(); /* by our clock */
	if (pycopy_submit(ctx, segment, sizeof(*segment)))
		done = PYCOPY_INT_RING_FULL;
	pycopy_count(done, 1);
}

#endif
