/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Which address a copy gets where responses come from another host: the client's own, or
 * one of -c.  The same choice as in pycopy/session/addresses.py, by the same hash, since
 * either executor may open a client's next connection.
 */
#ifndef PYCOPY_POOL_H
#define PYCOPY_POOL_H

#include "maps.h"

/* zlib.crc32() of an address: bit by bit, for a SYN can wait that long. */
static __always_inline u32 pycopy_crc32(const u8 *address)
{
	u32 crc = ~0U;

#pragma clang loop unroll(disable)
	for (u64 i = 0; i < 128; i++) {
		PYCOPY_PIN(i);
		if (!(i & 7))
			crc ^= address[(i >> 3) & 15];
		crc = (crc >> 1) ^ (0xedb88320 & -(crc & 1));
	}
	return ~crc;
}

static __always_inline void pycopy_put_half(u8 *to, u64 half)
{
	u32 upper = htonl((u32)(half >> 32)), lower = htonl((u32)half);

	__builtin_memcpy(to, &upper, sizeof(upper));
	__builtin_memcpy(to + 4, &lower, sizeof(lower));
}

/* addresses.PooledAddresses, its first choice: non-zero if there is none for the client. */
static __always_inline int pycopy_choose_address(struct pycopy_key *key, const u8 *client,
						 u8 family, const struct pycopy_fast_config *config)
{
	u32 first = family == 6 ? PYCOPY_POOL_NETWORKS + 1 : 0, at;
	u32 networks = family == 6 ? config->pool6 : config->pool4;
	const struct pycopy_pool *network = 0, *next;
	u64 number, low;

	if (!config->pool4 && !config->pool6) {
		__builtin_memcpy(key->client_addr, client, sizeof(key->client_addr));
		return 0;
	}
	at = first + networks;
	next = pycopy_lookup(PYCOPY_MAP_POOL, &at);
	if (!networks || !next || !next->before)
		return -1;
	number = pycopy_crc32(client) % next->before;
	/* The last network that begins at or before this number. */
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_POOL_NETWORKS; i++) {
		PYCOPY_PIN(i);
		at = first + i;
		next = pycopy_lookup(PYCOPY_MAP_POOL, &at);
		if (i >= networks || !next || next->before > number)
			break;
		network = next;
	}
	if (!network)
		return -1;
	low = network->low + (number - network->before);
	pycopy_put_half(key->client_addr, network->high + (low < network->low));
	pycopy_put_half(key->client_addr + 8, low);
	return 0;
}

#endif
