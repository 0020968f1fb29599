/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The maps of the kernel's sessions.  Several programs share them, so user space
 * makes them (pycopy/fastpath/maps.py) and compiles their descriptors in, as
 * PYCOPY_MAP_*: what bcc declares in a text belongs to that text alone.
 */
#ifndef PYCOPY_MAPS_H
#define PYCOPY_MAPS_H

#include "parse.h"

#define PYCOPY_MAP(fd) bpf_pseudo_fd(1, fd)

/* bcc rewrites calls of the helpers' own names for maps of its own. */
static void *(*const pycopy_map_lookup)(u64 map, const void *key) = (void *)1;
static long (*const pycopy_map_update)(u64 map, const void *key, const void *value,
				 u64 flags) = (void *)2;
static long (*const pycopy_map_delete)(u64 map, const void *key) = (void *)3;
static long (*const pycopy_map_push)(u64 map, const void *value, u64 flags) = (void *)87;
static long (*const pycopy_map_pop)(u64 map, void *value) = (void *)88;
static long (*const pycopy_map_peek)(u64 map, void *value) = (void *)89;
static long (*const pycopy_ring_output)(u64 ring, void *data, u64 bytes, u64 flags) = (void *)130;

#define pycopy_lookup(fd, key)		       pycopy_map_lookup(PYCOPY_MAP(fd), key)
#define pycopy_update(fd, key, value, flags)   pycopy_map_update(PYCOPY_MAP(fd), key, value, flags)
#define pycopy_delete(fd, key)		       pycopy_map_delete(PYCOPY_MAP(fd), key)

#define PYCOPY_NOEXIST 1   /* BPF_NOEXIST */
#define PYCOPY_EXISTS  -17 /* -EEXIST: what an update with it says then */

static __always_inline struct pycopy_fast_config *pycopy_config(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_CONFIG, &zero);
}

static __always_inline u64 pycopy_now(const struct pycopy_fast_config *config)
{
	return config->now_ns ? config->now_ns : bpf_ktime_get_ns();
}

static __always_inline u64 *pycopy_fast_counts(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_COUNTS, &zero);
}

/* The session has something pending: the timer looks at it. */
static __always_inline void pycopy_watch(u32 slot)
{
	u32 word = slot / 64;
	u64 bit = 1ULL << (slot & 63);
	u64 *bits = pycopy_lookup(PYCOPY_MAP_PENDING, &word);

	if (bits && !(*bits & bit))
		__sync_fetch_and_or(bits, bit);
}

#endif
